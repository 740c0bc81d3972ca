"""What each technique of the engine is worth: one load with all of them on, then with each of them off in turn."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from llmopt.bench.engine_load import run_workload
from llmopt.bench.machine import describe_machine
from llmopt.bench.metrics import RequestTrace, output_tokens_per_s, summarize_latency
from llmopt.bench.report import VERSION, engine_settings
from llmopt.bench.workload import Workload
from llmopt.engine.config import EngineConfig
from llmopt.engine.engine import Engine
from llmopt.progress import Progress

ALL_ON = "all on"
LOAD = {"num_prompts": 48, "input_len": 320, "output_len": 48, "random_range_ratio": 0.8, "random_prefix_len": 128}
"""The load where nothing else is said: lengths that differ, some of them long, after a beginning that is common to all,
as a system prompt is."""
SHARE_OF_CAPACITY = 0.7
"""Where no rate is given, requests come at this share of what the engine does when all come at once: enough to fill
batches, and not so much that a queue grows without end and its length is all that is seen."""


@dataclass(frozen=True)
class Technique:
    """One that can be turned off.

    Attributes:
        name: as the table says it.
        off: the settings of `EngineConfig` that turn it off. A row is measured where the engine's are others.
        needs_kernels: whether there is something to turn off only where the decoder runs as one compiled operation.
    """

    name: str
    off: Mapping[str, Any]
    needs_kernels: bool = False

    def is_on(self, engine: Engine) -> bool:
        differs = any(getattr(engine.config, name) != value for name, value in self.off.items())
        return differs and (engine.runner.fused is not None or not self.needs_kernels)


TECHNIQUES = (
    Technique("prefix caching off", {"enable_prefix_caching": False}),
    Technique("chunked prefill off", {"chunked_prefill_size": 0, "max_num_batched_tokens": 1 << 20}),
    Technique("dynamic batching", {"batching": "dynamic"}),
    Technique("static batching", {"batching": "static"}),
    Technique("one at a time", {"max_num_seqs": 1}),
    Technique("no drafted tokens", {"speculative_config": None}),
    Technique("KV cache not quantized", {"kv_cache_dtype": "auto"}),
    Technique("float32, layer by layer", {"dtype": "float32"}, needs_kernels=True),
)


def bench_ablation(
    model: str, workload: Workload, repeats: int, progress: Progress, **engine_options: Any
) -> dict[str, Any]:
    """Measure a load with everything on and with each technique off; what `llmopt bench MODEL --ablate --json` writes.

    The rounds go through all variants in turn, so that what slows the machine down for a while slows all of them.
    A workload whose rate is infinite is given one by `SHARE_OF_CAPACITY`.
    """
    config = EngineConfig(model=model, **engine_options)
    engine = Engine(config, progress)
    variants = {ALL_ON: config}
    for technique in TECHNIQUES:
        if technique.is_on(engine):
            variants[technique.name] = replace(config, **technique.off)
    if not workload.describe()["request_rate"]:
        rate = _requests_per_s(run_workload(engine, workload, progress, "how much it can do"))
        workload = replace(workload, request_rate=SHARE_OF_CAPACITY * rate)
    machine = describe_machine(engine.runner.backend.device)
    rounds: dict[str, list[list[RequestTrace]]] = {name: [] for name in variants}
    for repeat in range(repeats):
        for index, (name, variant) in enumerate(variants.items()):
            del engine
            gc.collect()  # a cache may be large, and two of them too large
            engine = Engine(variant)
            phase = f"{repeat * len(variants) + index + 1} of {repeats * len(variants)}: {name}"
            rounds[name].append(run_workload(engine, replace(workload, seed=workload.seed + repeat), progress, phase))
    rows = [{"name": name, **summarize_rounds(traces)} for name, traces in rounds.items()]
    for row in rows:
        row["of_all_on"] = row["output_tokens_per_s"] / rows[0]["output_tokens_per_s"]
    return {
        "version": VERSION,
        "model": model,
        "machine": machine,
        "engine": engine_settings(engine_options),
        "repeats": repeats,
        "num_prompts": workload.num_prompts,
        **workload.describe(),
        "rows": rows,
    }


def summarize_rounds(rounds: Sequence[Sequence[RequestTrace]]) -> dict[str, Any]:
    """Of each number the median over the rounds: output tokens per second, and the summaries of TTFT and ITL."""
    result: dict[str, Any] = {"output_tokens_per_s": median(output_tokens_per_s(one, _seconds(one)) for one in rounds)}
    for metric in ("ttft_ms", "itl_ms", "e2e_ms"):
        summaries = [summary for one in rounds if (summary := summarize_latency(metric, one)) is not None]
        keys = summaries[0] if summaries else ()
        result[metric] = {key: median(summary[key] for summary in summaries) for key in keys} or None
    return result


def _seconds(traces: Sequence[RequestTrace]) -> float:
    return max(trace.finished for trace in traces) - min(trace.sent for trace in traces)


def _requests_per_s(traces: Sequence[RequestTrace]) -> float:
    return len(traces) / _seconds(traces)
