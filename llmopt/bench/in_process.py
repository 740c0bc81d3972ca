"""Measures an engine in this process: prefill and decode, for a grid of batch sizes and lengths."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from llmopt.bench.datasets import random_tokens
from llmopt.bench.machine import describe_machine
from llmopt.bench.report import in_process_report
from llmopt.engine.config import EngineConfig
from llmopt.engine.engine import Engine
from llmopt.engine.outputs import SpeculationStats
from llmopt.engine.params import SamplingParams
from llmopt.engine.resident import keep_resident
from llmopt.errors import InputError, LlmoptError
from llmopt.model.source import open_source
from llmopt.progress import Progress, silent

WARM_UP_TOKENS = 4


@dataclass(frozen=True, order=True)
class Case:
    """A point of the grid: `batch` requests at once, each of prompt_len tokens in and gen_len tokens out."""

    batch: int
    prompt_len: int
    gen_len: int


@dataclass(frozen=True)
class Round:
    """One run of a case, from when all its requests were added.

    Attributes:
        prefill_s: until the last request has its first token.
        decode_s: from there until the last request has ended.
        decode_tokens: given out in decode_s; less than batch * (gen_len - 1) where some requests were already
            decoding while others were still in prefill.
    """

    prefill_s: float
    decode_s: float
    decode_tokens: int


@dataclass
class Measurement:
    """A case, its rounds, and what became of the tokens drafted in them."""

    case: Case
    rounds: list[Round] = field(default_factory=list)
    speculation: SpeculationStats | None = None

    @property
    def prefill_tokens_per_s(self) -> list[float]:
        """Prompt tokens of the batch / prefill_s, for each round. The choice of each first token is in the time."""
        return [self.case.batch * self.case.prompt_len / each.prefill_s for each in self.rounds]

    @property
    def ttft_ms(self) -> list[float]:
        """Milliseconds until every request of the batch has its first token, for each round."""
        return [1e3 * each.prefill_s for each in self.rounds]

    @property
    def decode_tokens_per_s(self) -> list[float]:
        """Tokens given out after prefill / decode_s, for each round; nothing where gen_len is 1."""
        return [each.decode_tokens / each.decode_s for each in self.rounds if each.decode_tokens]


def weight_bytes(model: str) -> int:
    """The size of the files that hold MODEL's weights."""
    return sum(file.stat().st_size for file in open_source(model).files())


def grid(prompt_lens: Sequence[int], gen_lens: Sequence[int], batches: Sequence[int]) -> list[Case]:
    """Every combination, in the order given. Raises InputError for a number under 1."""
    for flag, values in (("--prompt-len", prompt_lens), ("--gen-len", gen_lens), ("--batch", batches)):
        if not values or min(values) < 1:
            raise InputError(f"{flag} needs numbers of at least 1, not {list(values)}")
    return [Case(batch, prompt, gen) for prompt, gen, batch in product(prompt_lens, gen_lens, batches)]


def bench_model(
    model: str, cases: Sequence[Case], repeats: int, seed: int, progress: Progress, **engine_options: Any
) -> dict[str, Any]:
    """Load a model, measure the cases and the machine; the object that `llmopt bench MODEL --json` writes.

    `engine_options` are further settings of `EngineConfig`; the number and length of requests follow from the cases.
    """
    longest = max(case.prompt_len + case.gen_len for case in cases)
    widest = max(case.batch for case in cases)
    # A grid measures prefill and decode one after the other: nothing is to be spread over steps that decode.
    shape: dict[str, Any] = {"max_num_seqs": widest, "max_model_len": longest, "chunked_prefill_size": 0}
    config = EngineConfig(model=model, **shape, **engine_options)
    engine = Engine(config, progress)
    keep_resident()  # as a server does
    measurements = measure(engine, cases, repeats, seed, progress)
    machine = describe_machine(engine.runner.backend.device)
    return in_process_report(model, weight_bytes(model), machine, measurements)


def measure(
    engine: Engine, cases: Sequence[Case], repeats: int, seed: int = 0, progress: Progress = silent
) -> list[Measurement]:
    """Run every case once to warm up, with few tokens, and `repeats` times to measure, on random prompts that no
    other round has seen.

    Raises InputError for a case that does not fit into the engine's cache at once, LlmoptError where the engine
    preempted requests, so that their prompts were computed twice.
    """
    if repeats < 1 or seed < 0:
        raise InputError(f"--repeats must be at least 1 and --seed at least 0, not {repeats} and {seed}")
    for case in cases:
        _require_room(engine, case)
    rng = np.random.default_rng(seed)
    measurements = []
    for index, case in enumerate(cases):
        phase = f"{case.batch} × ({case.prompt_len} in, {case.gen_len} out)"
        run_round(engine, Case(case.batch, case.prompt_len, min(case.gen_len, WARM_UP_TOKENS)), rng, f"warm-up {index}")
        measurement = Measurement(case)
        before = engine.stats().speculation
        for repeat in range(repeats):
            progress(phase, repeat, repeats)
            measurement.rounds.append(run_round(engine, case, rng, f"{index}.{repeat}"))
        measurement.speculation = _since(before, engine.stats().speculation)
        measurements.append(measurement)
    return measurements


def _since(before: SpeculationStats | None, after: SpeculationStats | None) -> SpeculationStats | None:
    """What became of the tokens that were drafted between two looks at the engine."""
    if before is None or after is None:
        return None
    return SpeculationStats(
        after.drafts - before.drafts,
        after.draft_tokens - before.draft_tokens,
        after.accepted_tokens - before.accepted_tokens,
        [late - early for early, late in zip(before.accepted_by_position, after.accepted_by_position, strict=True)],
    )


def run_round(engine: Engine, case: Case, rng: np.random.Generator, name: str) -> Round:
    """Run one batch to its end; its request ids begin with `name`."""
    preemptions = engine.stats().preemptions
    start = add_random(engine, case, rng, name)
    begun: set[str] = set()
    early = 0
    while len(begun) < case.batch and engine.has_work:
        deltas = engine.step()
        begun.update(delta.request_id for delta in deltas)
        early += sum(len(delta.token_ids) for delta in deltas)
    end_of_prefill = time.perf_counter()
    late = 0
    while engine.has_work:
        late += sum(len(delta.token_ids) for delta in engine.step())
    end = time.perf_counter()
    if engine.stats().preemptions != preemptions:
        raise LlmoptError(f"{case} was preempted for want of cache; give a larger --kv-cache-memory-bytes")
    if early + late != case.batch * case.gen_len:
        raise LlmoptError(f"{case} gave out {early + late} tokens instead of {case.batch * case.gen_len}")
    return Round(end_of_prefill - start, end - end_of_prefill, late)


def add_random(engine: Engine, case: Case, rng: np.random.Generator, name: str) -> float:
    """Add the requests of a case, with random prompts and ids that begin with `name`; when the first was added."""
    vocabulary = min(engine.model_config.vocab_size, engine.tokenizer.vocab_size)
    prompts = random_tokens(case.batch, case.prompt_len, vocabulary, engine.tokenizer.special_ids, rng)
    params = SamplingParams(max_tokens=case.gen_len, ignore_eos=True, temperature=0.0)
    start = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add(f"{name} {index}", prompt, params)
    return start


def _require_room(engine: Engine, case: Case) -> None:
    block_size = engine.config.block_size
    needed = case.batch * -(-(case.prompt_len + case.gen_len) // block_size)
    total = engine.stats().total_blocks
    if needed > total:
        raise InputError(
            f"{case.batch} requests of {case.prompt_len} + {case.gen_len} tokens need {needed} cache blocks of "
            f"{block_size} tokens at once and there are {total}; give a larger --kv-cache-memory-bytes or smaller cases"
        )
