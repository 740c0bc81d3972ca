"""Where the time of a step goes, and how near a step comes to what the memory allows."""

import time
from collections import defaultdict
from statistics import median
from typing import Any

import numpy as np

from llmopt.backend.kv_cache import bytes_per_token
from llmopt.bench.in_process import Case, add_random
from llmopt.bench.machine import describe_machine
from llmopt.bench.report import VERSION
from llmopt.engine.config import EngineConfig
from llmopt.engine.engine import Engine
from llmopt.errors import LlmoptError
from llmopt.progress import Progress, silent

OVERHEAD = ("schedule", "sample", "detokenize")
"""The phases that are the engine's own; all but the last are on the way of the next token."""


class PhaseTimes:
    """Adds up the seconds of each phase; an engine's `watch`. What lies between two steps is the phase `rest`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def begin(self) -> None:
        """A step begins."""
        self("rest")


def bench_profile(model: str, case: Case, seed: int, progress: Progress, **engine_options: Any) -> dict[str, Any]:
    """Load a model and profile its decoding steps; the object that `llmopt bench MODEL --profile --json` writes."""
    shape: dict[str, Any] = {"max_num_seqs": case.batch, "max_model_len": case.prompt_len + case.gen_len}
    engine = Engine(EngineConfig(model=model, chunked_prefill_size=0, **shape, **engine_options), progress)
    result = profile(engine, case, seed, progress)
    machine = describe_machine(engine.runner.backend.device)
    bandwidth = result["bytes"]["total"] / result["compute_ms"] * 1e3
    of_limit = bandwidth / (1e9 * machine["memory_gb_per_s"])
    return {
        "version": VERSION,
        "model": model,
        "machine": machine,
        "batch": case.batch,
        "prompt_len": case.prompt_len,
        "gen_len": case.gen_len,
        **result,
        "gb_per_s": bandwidth / 1e9,
        "of_memory_limit": of_limit,
    }


def profile(engine: Engine, case: Case, seed: int = 0, progress: Progress = silent) -> dict[str, Any]:
    """Run a batch to its end, and look at the steps in which all of it decodes.

    Returns:
        steps; step_ms, the time of one; phases, the milliseconds of each in a step and their share of it, the longest
        first; compute_ms; overhead, the share of OVERHEAD; bytes that a step reads, of weights and of the KV cache (in
        the middle of these steps).

    Raises LlmoptError where the batch is never whole.
    """
    rng = np.random.default_rng(seed)
    add_random(engine, case, rng, "profile")
    begun: set[str] = set()
    while len(begun) < case.batch and engine.has_work:
        begun.update(delta.request_id for delta in engine.step())
    times = PhaseTimes()
    engine.watch = times
    steps, read = 0, []
    while engine.stats().running == case.batch and engine.has_work:
        progress("steps", steps, case.gen_len)
        read.append(kv_bytes(engine))
        if not steps:
            times = engine.watch = PhaseTimes()
        times.begin()
        engine.step()
        steps += 1
    if not steps:
        raise LlmoptError(f"{case.batch} requests never decoded side by side; ask for more tokens")
    total = sum(times.seconds.values())
    phases = [
        {"name": name, "ms": 1e3 * seconds / steps, "share": seconds / total}
        for name, seconds in sorted(times.seconds.items(), key=lambda item: -item[1])
    ]
    weights, kv = engine.runner.decoder.step_bytes, int(median(read))
    return {
        "steps": steps,
        "step_ms": 1e3 * total / steps,
        "phases": phases,
        "compute_ms": 1e3 * times.seconds["compute"] / steps,
        "overhead": sum(times.seconds[name] for name in OVERHEAD) / total,
        "bytes": {"weights": weights, "kv": kv, "total": weights + kv},
    }


def kv_bytes(engine: Engine) -> int:
    """Bytes of keys and values that a step reads in which all that run decode; less than all in layers with a window."""
    model = engine.model_config
    each = bytes_per_token(engine.runner.cache_kind, model.num_kv_heads, model.head_dim)
    lengths = [request.known for request in engine.scheduler.running]
    return each * sum(min(length, window or length) for window in model.windows for length in lengths)
