"""Where the time of a step goes, and how near a step comes to what the memory allows."""

import time
from collections import defaultdict
from typing import Any

import numpy as np

from llmopt.backend.kv_cache import bytes_per_token
from llmopt.bench.in_process import Case, add_random
from llmopt.bench.machine import describe_machine
from llmopt.bench.report import VERSION
from llmopt.engine.config import EngineConfig
from llmopt.engine.engine import Engine
from llmopt.engine.resident import keep_resident
from llmopt.errors import LlmoptError
from llmopt.progress import Progress, silent

OVERHEAD = ("schedule", "sample", "detokenize")
"""The phases whose sum is the engine's overhead: what is neither the model nor the laying out of its input."""
REST = "rest"
"""The phase between two steps, which belongs to whoever drives the engine."""


class PhaseTimes:
    """An engine's `watch`: adds up the seconds of each phase of its steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def __call__(self, phase: str) -> None:
        """A phase has ended, and with it the time since the last one did."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


def bench_profile(model: str, case: Case, seed: int, progress: Progress, **engine_options: Any) -> dict[str, Any]:
    """Load a model and profile its decoding steps; the object that `llmopt bench MODEL --profile --json` writes."""
    shape: dict[str, Any] = {"max_num_seqs": case.batch, "max_model_len": case.prompt_len + case.gen_len}
    engine = Engine(EngineConfig(model=model, chunked_prefill_size=0, **shape, **engine_options), progress)
    keep_resident()  # as a server does
    result = profile(engine, case, seed, progress)
    machine = describe_machine(engine.runner.backend.device)
    gb_per_s = result["bytes"]["total"] / 1e6 / result["compute_ms"]
    return {
        "version": VERSION,
        "model": model,
        "machine": machine,
        "batch": case.batch,
        "prompt_len": case.prompt_len,
        "gen_len": case.gen_len,
        **result,
        "gb_per_s": gb_per_s,
        "of_memory_limit": gb_per_s / machine["memory_gb_per_s"],
    }


def profile(engine: Engine, case: Case, seed: int = 0, progress: Progress = silent) -> dict[str, Any]:
    """Run a batch to its end, and look at the steps in which all of it decodes.

    Returns:
        steps, and step_ms, the time of one; phases, the milliseconds of each in a step and their share of it, the
        longest first; compute_ms; overhead, the share of OVERHEAD; bytes that a step reads: of weights, of the KV cache
        (half way between the first of these steps and the last), total.

    Raises LlmoptError where the batch is never whole.
    """
    add_random(engine, case, np.random.default_rng(seed), "profile")
    begun: set[str] = set()
    while len(begun) < case.batch and engine.has_work:
        begun.update(delta.request_id for delta in engine.step())
    lengths = [request.known for request in engine.scheduler.running]
    steps, times = 0, PhaseTimes()
    engine.watch = times
    while len(engine.scheduler.running) == case.batch:
        times(REST)
        engine.step()
        steps += 1
        progress("steps", steps, case.gen_len)
    if not steps:
        raise LlmoptError(f"{case.batch} requests never decoded side by side; ask for more tokens")
    total = sum(times.seconds.values())
    weights, kv = engine.runner.decoder.step_bytes, kv_bytes(engine, [length + steps // 2 for length in lengths])
    return {
        "steps": steps,
        "step_ms": 1e3 * total / steps,
        "phases": [
            {"name": name, "ms": 1e3 * seconds / steps, "share": seconds / total}
            for name, seconds in sorted(times.seconds.items(), key=lambda item: -item[1])
        ],
        "compute_ms": 1e3 * times.seconds["compute"] / steps,
        "overhead": sum(times.seconds[name] for name in OVERHEAD) / total,
        "bytes": {"weights": weights, "kv": kv, "total": weights + kv},
    }


def kv_bytes(engine: Engine, lengths: list[int]) -> int:
    """Bytes of keys and values that a step reads which decodes requests of these lengths; a layer with a window reads
    no more than that of each."""
    model = engine.model_config
    each = bytes_per_token(engine.runner.cache_kind, model.num_kv_heads, model.head_dim)
    return each * sum(min(length, window or length) for window in model.windows for length in lengths)
