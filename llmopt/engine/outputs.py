"""What the engine says about a request: deltas while it runs, and the whole at the end."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities at one step, from the logits as the model gave them.

    Attributes:
        token_id: the chosen token.
        logprob: its log-probability.
        rank: how many tokens are at least as likely, itself included; 1 for the likeliest.
        top: (token, log-probability) of the likeliest tokens, most likely first.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Delta:
    """What one engine step added to one request.

    Text may lag behind tokens: a character is given out once it is whole, and text that may be the beginning of a
    stop string once it is known not to be.

    Attributes:
        stop_reason: the stop string or stop token that ended it, None for the model's own end token.
        prompt_tokens, output_tokens: how many so far.
        prompt_logprobs: in the first delta of a request that wants them, one for each token of the prompt; the first of
            them is None, because nothing comes before it.
        cached_tokens: how many of the prompt's were found in the cache.
    """

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    prompt_tokens: int
    output_tokens: int
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class SpeculationStats:
    """What became of drafted tokens since the start of the process.

    Attributes:
        drafts: how often tokens were drafted for a request and verified.
        draft_tokens: how many were, in all.
        accepted_tokens: how many of them the target chose too.
        accepted_by_position: how many of those were drafted as the first of a draft, as the second, and so on.
    """

    drafts: int
    draft_tokens: int
    accepted_tokens: int
    accepted_by_position: list[int]


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """The engine's state after a step; counters count from the start of the process.

    Attributes:
        used_blocks, cached_blocks: in requests' tables, and kept for requests to come; the rest of the total is free.
        prefix_cache_queries, prefix_cache_hits: prompt tokens that were looked for in the cache, and those found.
        speculation: None where nothing is drafted.
    """

    running: int
    waiting: int
    total_blocks: int
    used_blocks: int
    cached_blocks: int
    preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    prompt_tokens: int
    generation_tokens: int
    steps: int
    speculation: SpeculationStats | None = None

    @property
    def kv_cache_usage(self) -> float:
        """The share of the block pool in use, 0 to 1."""
        return self.used_blocks / self.total_blocks


@dataclass
class CompletionOutput:
    """One completion of a prompt, as `LLM.generate` returns it (vLLM's names)."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    """All completions of one prompt.

    Attributes:
        prompt_logprobs: as in `Delta`.
        num_cached_tokens: how many tokens of the prompt were found in the cache for the first of them.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
