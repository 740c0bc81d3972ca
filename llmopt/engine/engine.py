"""The loop that all of llmopt runs on: schedule, draft, compute, sample, give out."""

import random
from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from llmopt.engine.admission import admission_of
from llmopt.engine.batch import Batch, build_batch
from llmopt.engine.block_keys import BlockKeys
from llmopt.engine.block_pool import BlockPool
from llmopt.engine.config import EngineConfig
from llmopt.engine.generation import Generation
from llmopt.engine.outputs import Delta, EngineStats
from llmopt.engine.params import SamplingParams
from llmopt.engine.prefill_pace import pace_of
from llmopt.engine.prompt_logprobs import due_tokens, report_prompts
from llmopt.engine.request import Request
from llmopt.engine.runner import Runner
from llmopt.engine.sampler import Sampled, Sampler
from llmopt.engine.scheduler import Chunk, Scheduler
from llmopt.engine.speculation.config import SpeculativeConfig
from llmopt.engine.speculation.draft_model import DraftModel, open_draft
from llmopt.engine.speculation.ngram import NgramDrafter
from llmopt.engine.speculation.speculator import Speculator
from llmopt.engine.token_rules import TokenRules
from llmopt.errors import InputError
from llmopt.model.config import ModelConfig
from llmopt.model.source import ModelSource, open_source
from llmopt.model.tokenizer import Tokenizer
from llmopt.progress import Progress, silent


class Engine:
    """A model and the requests it works on. `add` puts one in, `step` moves all of them on.

    Not safe for several threads: whoever owns the engine calls it from one.

    Attributes:
        watch: told the name of each phase of a step when it has ended, for whoever wants to know what takes how long.
    """

    def __init__(self, config: EngineConfig, progress: Progress = silent) -> None:
        source = open_source(config.model)
        self.config = config
        self.model_config: ModelConfig = source.config
        self.tokenizer: Tokenizer = source.tokenizer
        self.default_sampling = _advised_sampling(source.generation_config)
        drafting = config.speculative_config
        draft = None if drafting is None or drafting.model is None else open_draft(drafting.model, source)
        self.runner = Runner(source, config, progress, draft=None if draft is None else draft.config)
        self.max_model_len = self.runner.plan.max_model_len
        self.pool = BlockPool(self.runner.plan.blocks, config.block_size)
        keys = BlockKeys(config.block_size) if config.enable_prefix_caching else None
        self.scheduler = Scheduler(
            self.pool,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            keys,
            pace_of(config.chunked_prefill_size, self.runner.backend.device.type, source.config),
            admission_of(config.batching, config.max_num_seqs, config.batching_window_s),
        )
        self.sampler = Sampler(self.runner.backend)
        self.speculator = None if drafting is None else self._speculator(drafting, draft, progress)
        self.watch: Callable[[str], None] = lambda phase: None
        self._generations: dict[str, Generation] = {}
        self._seeds = random.Random(config.seed)
        self._steps = self._prompt_tokens = self._generation_tokens = 0

    def add(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Let a prompt of tokens wait for its turn.

        `priority` and `cache_salt` are vLLM's: the lower the priority, the earlier the turn; only prompts with the same
        salt share what was computed for them.

        Raises InputError where it can never be served: empty, too long, a token that does not exist, no token left to
        choose, an id in use, a priority where they do not count, or more than one completion (whoever wants several
        adds several requests, which share what is computed of their prompt).
        """
        if request_id in self._generations:
            raise InputError(f"there is a request {request_id} already")
        if params.n != 1:
            raise InputError("the engine generates one completion a request; add one request for each")
        if priority != 0 and self.config.scheduling_policy != "priority":
            raise InputError(f"a priority of {priority} counts with --scheduling-policy priority only; leave it out")
        if cache_salt == "":
            raise InputError("cache_salt must not be empty; leave it out to share with all that have none")
        self.check_prompt(prompt)
        for name, tokens in params.named_tokens.items():
            self._check_tokens(tokens, name)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        request = Request(request_id, prompt, params, seed, self._rules(params), priority, cache_salt)
        self._generations[request_id] = Generation(request, self.tokenizer, self.max_model_len)
        self.scheduler.add(request)

    def check_prompt(self, prompt: list[int]) -> None:
        """Raise InputError for a prompt that this engine cannot take."""
        if not prompt:
            raise InputError("the prompt is empty; it must hold at least one token")
        if len(prompt) >= self.max_model_len:
            raise InputError(
                f"the prompt has {len(prompt)} tokens; prompt and output together may have {self.max_model_len}"
            )
        self._check_tokens(prompt, "the prompt")

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks; one that has already ended is no matter."""
        generation = self._generations.pop(request_id, None)
        if generation is not None:
            self.scheduler.remove(generation.request)

    @property
    def has_work(self) -> bool:
        return bool(self._generations)

    @property
    def pause(self) -> float:
        """Seconds for which a step would compute nothing unless something comes: those until a batch that is being
        gathered begins, else 0."""
        return self.scheduler.pause

    def step(self) -> list[Delta]:
        """Compute one step of the batch and give out what it added, in the order in which it was scheduled."""
        if self.speculator is not None:
            self.speculator.plan(self.scheduler.running, lambda request: self._generations[request.id].left)
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        self.watch("schedule")
        if self.speculator is not None:
            chunks = self.speculator.draft(chunks)
            self.watch("draft")
        batch = build_batch(chunks, self.config.block_size)
        self.watch("build batch")
        logits = self._compute(chunks, batch)
        self.watch("compute")
        sampled = self.sampler(logits, batch.rows)
        self.watch("sample")
        deltas = self._advance(chunks, sampled)
        self.watch("detokenize")
        self.scheduler.retire(chunks)
        for delta in deltas:
            if delta.finish_reason is not None:
                self._finish(delta.request_id)
        if self.speculator is not None:
            self.speculator.observe(chunks)
        self.watch("schedule")
        self._steps += 1
        self._generation_tokens += sum(len(delta.token_ids) for delta in deltas)
        return deltas

    def _advance(self, chunks: list[Chunk], sampled: Sampled) -> list[Delta]:
        """Give each request whose gap is closed the tokens that were chosen to follow: one, or more where those that
        were drafted stand."""
        deltas, start = [], 0
        for chunk in chunks:
            if chunk.closes_gap:
                rows = slice(start, start + 1 + chunk.drafted)
                start = rows.stop
                tokens: Sequence[int] = sampled.token_ids[rows]
                if self.speculator is not None:
                    tokens = self.speculator.verify(chunk, tokens)
                deltas.append(self._generations[chunk.request.id].advance(tokens, sampled.logprobs[rows]))
        return deltas

    def _compute(self, chunks: list[Chunk], batch: Batch) -> Tensor:
        """The logits to sample from; on the way, what is to be reported of prompts."""
        due = due_tokens(chunks)
        if not due:
            return self.runner.run(batch)
        hidden = self.runner.hidden(batch)
        report_prompts(due, hidden, self.runner)
        return self.runner.logits(hidden[batch.last_rows.tolist()])

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            total_blocks=self.pool.total,
            used_blocks=self.pool.used,
            cached_blocks=self.pool.cached,
            preemptions=self.scheduler.preemptions,
            prefix_cache_queries=self.scheduler.queried,
            prefix_cache_hits=self.scheduler.found,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            steps=self._steps,
            speculation=None if self.speculator is None else self.speculator.stats(),
        )

    def check(self) -> None:
        """Raise LlmoptError unless every block of the KV cache is accounted for."""
        self.scheduler.check()

    def _rules(self, params: SamplingParams) -> TokenRules:
        size = self.model_config.vocab_size
        return TokenRules.of(params, self.tokenizer, frozenset(i for i in self.tokenizer.eos_ids if i < size), size)

    def _check_tokens(self, tokens: Collection[int], what: str) -> None:
        last = self.model_config.vocab_size - 1
        if tokens and not 0 <= min(tokens) <= max(tokens) <= last:
            raise InputError(f"{what} holds a token outside the vocabulary of 0 to {last}")

    def _speculator(self, config: SpeculativeConfig, draft: ModelSource | None, progress: Progress) -> Speculator:
        if draft is None:
            return Speculator(NgramDrafter(*config.lookup), config.most)
        runner = Runner(draft, self.config, progress, target=self.runner)
        return Speculator(DraftModel(runner, self.config.block_size, self.config.max_num_batched_tokens), config.most)

    def _finish(self, request_id: str) -> None:
        request = self._generations.pop(request_id).request
        self.scheduler.remove(request)
        self._prompt_tokens += request.prompt_length


def _advised_sampling(generation_config: dict) -> dict[str, float]:
    """The sampling parameters that a model's makers advise, as far as they are parameters here.

    Raises InputError where they make no sense.
    """
    if generation_config.get("do_sample") is False:
        return {}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    advised = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    try:
        SamplingParams(**advised)
    except (InputError, TypeError) as error:
        raise InputError(f"the model's generation_config.json: {error}") from None
    return advised
