"""How long streams stall while a long prompt is taken in: with the prompt in chunks, and in one piece."""

import time
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from llmopt.bench.datasets import random_tokens
from llmopt.bench.in_process import Case, add_random
from llmopt.bench.machine import describe_machine
from llmopt.bench.report import VERSION, spread
from llmopt.engine.config import EngineConfig
from llmopt.engine.engine import Engine
from llmopt.engine.params import SamplingParams
from llmopt.engine.resident import keep_resident
from llmopt.errors import LlmoptError
from llmopt.progress import Progress, silent

STREAM_PROMPT = 64  # tokens of each stream's own prompt
QUIET_STEPS = 64  # steps of undisturbed decoding before the long prompt comes
LONG = "long"


def bench_stall(
    model: str, streams: int, prompt_len: int, repeats: int, seed: int, progress: Progress, **engine_options: Any
) -> dict[str, Any]:
    """Measure with and without chunks in turn; the object that `llmopt bench MODEL --stall --json` writes."""
    chunked = EngineConfig(model=model, max_num_seqs=streams + 1, **engine_options)
    whole = replace(chunked, chunked_prefill_size=0, max_num_batched_tokens=prompt_len + streams + 1)
    engines = {"chunked": Engine(chunked, progress), "in one piece": Engine(whole, progress)}
    keep_resident()  # as a server does
    machine = describe_machine(engines["chunked"].runner.backend.device)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for repeat in range(repeats):
        for name, engine in engines.items():
            found[name].append(stall(engine, streams, prompt_len, seed + repeat, progress, f"{name}, {repeat + 1}"))
    return {
        "version": VERSION,
        "model": model,
        "machine": machine,
        "streams": streams,
        "prompt_len": prompt_len,
        "repeats": repeats,
        "rows": [
            {
                "name": name,
                **{key: spread([one[key] for one in found[name]]) for key in found[name][0]},
            }
            for name, engine in engines.items()
        ],
    }


def stall(
    engine: Engine, streams: int, prompt_len: int, seed: int = 0, progress: Progress = silent, phase: str = "stall"
) -> dict[str, float]:
    """Let streams decode, then a prompt come, and time the gaps between their tokens.

    Returns:
        median_ms: of the gaps before the prompt came; worst_ms: the longest gap from then until its first token;
        p99_ms: of those gaps; ratio: worst / median; ttft_ms: of the prompt; steps: that took it in.

    Raises LlmoptError where a stream got no token in a step, so that steps are not what its reader waits for.
    """
    rng = np.random.default_rng(seed)
    add_random(engine, Case(streams, STREAM_PROMPT, engine.max_model_len), rng, "stream")
    begun: set[str] = set()
    while len(begun) < streams:
        begun.update(delta.request_id for delta in engine.step())
    quiet = [_step(engine, streams)[0] for _ in range(QUIET_STEPS)]
    vocabulary = min(engine.model_config.vocab_size, engine.tokenizer.vocab_size)
    (prompt,) = random_tokens(1, prompt_len, vocabulary, engine.tokenizer.special_ids, rng)
    arrival = time.perf_counter()
    engine.add(LONG, prompt, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    gaps: list[float] = []
    answered = False
    while not answered:
        seconds, answered = _step(engine, streams)
        gaps.append(seconds)
        long = next((one for one in engine.scheduler.running if one.id == LONG), None)
        progress(phase, prompt_len if long is None else long.computed, prompt_len)
    ttft = time.perf_counter() - arrival
    for request in list(engine.scheduler.running):
        engine.abort(request.id)
    usual = median(quiet)
    return {
        "median_ms": 1e3 * usual,
        "worst_ms": 1e3 * max(gaps),
        "p99_ms": 1e3 * float(np.percentile(gaps, 99)),
        "ratio": max(gaps) / usual,
        "ttft_ms": 1e3 * ttft,
        "steps": len(gaps),
    }


def _step(engine: Engine, streams: int) -> tuple[float, bool]:
    """Seconds of a step, which all streams wait for, and whether the long prompt was answered in it."""
    start = time.perf_counter()
    deltas = engine.step()
    seconds = time.perf_counter() - start
    answered = any(delta.request_id == LONG for delta in deltas)
    if len(deltas) - answered != streams:
        raise LlmoptError(
            f"a step gave {len(deltas) - answered} of {streams} streams a token: there is no room for all"
        )
    return seconds, answered
