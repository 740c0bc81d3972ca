"""A request as the scheduler sees it: how many tokens are known, how many are computed."""

from array import array
from collections.abc import MutableSequence

from llmopt.engine.outputs import TokenLogprobs
from llmopt.engine.params import SamplingParams
from llmopt.engine.token_counts import TokenCounts
from llmopt.engine.token_rules import NO_RULES, TokenRules


class Request:
    """One prompt and what has been generated for it so far.

    Attributes:
        tokens: the tokens known: the prompt, then the output.
        computed: how many of them have their keys and values in the cache. A step closes the gap between the two,
            whether it comes from a new prompt, from one sampled token or from having been preempted.
        ahead: how many tokens after the known ones are to be drafted and verified in the next step, if there is room.
        drafts: those that the step in hand verifies, or none. They are not known: what does not turn out so is gone.
        blocks: its block table, the numbers of the cache blocks it holds, in order; 32-bit integers, which a batch
            takes over without looking at each.
        keys: by what its full blocks are found again (`BlockKeys`); none where nothing is to be found again.
        cache_salt: it shares blocks only with requests that have the same.
        priority: the lower, the earlier it is served; among equals, who came first is.
        arrival: its number in the order of arrival.
        preemptions: how often it had to give up its blocks.
        overtaken: how many that rank behind it were let in while it waited.
        cached_tokens: how many tokens of its prompt were found in the cache when it was first let in.
        seed: what its random choices are drawn from.
        rules: which tokens it favours and which it rules out.
        takes_likeliest: whether each token is that of the largest logit, and nothing is asked about it.
        counts: what its penalties are counted by; whoever samples lets it catch up, where there are penalties.
        prompt_logprobs: what has been reported of its prompt's tokens, from the first, of which there is nothing to
            report; None where nobody wants it.
    """

    def __init__(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        seed: int,
        rules: TokenRules = NO_RULES,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        self.id = request_id
        self.params = params
        self.seed = seed
        self.rules = rules
        self.prompt_length = len(prompt)
        self.tokens = list(prompt)
        self.computed = 0
        self.ahead = 0
        self.drafts: list[int] = []
        self.blocks: MutableSequence[int] = array("i")
        self.keys: list[bytes] = []
        self.cache_salt = cache_salt
        self.priority = priority
        self.arrival = 0
        self.preemptions = 0
        self.overtaken = 0
        self.cached_tokens = 0
        self.takes_likeliest = (
            params.greedy and params.logprobs is None and rules is NO_RULES and not params.has_penalties
        )
        self.counts = TokenCounts()
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if params.prompt_logprobs is None else [None]

    @property
    def known(self) -> int:
        return len(self.tokens)

    @property
    def rank(self) -> tuple[int, int]:
        """Whose rank is less goes first: to the blocks, to the budget and out of the queue."""
        return self.priority, self.arrival

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def skip_reading_prefix_cache(self) -> bool:
        """Whether every token of the prompt must be computed, since something is still to be reported of it."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_length

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.prompt_length]

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]
