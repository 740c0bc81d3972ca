"""Puts a load on an engine in this process: requests that come at their times, whatever the engine is doing."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmopt.bench.datasets import Prompt
from llmopt.bench.machine import describe_machine
from llmopt.bench.metrics import Chunk, RequestTrace
from llmopt.bench.report import engine_settings, load_report
from llmopt.bench.workload import Workload
from llmopt.engine.config import EngineConfig
from llmopt.engine.engine import Engine
from llmopt.engine.outputs import Delta
from llmopt.engine.params import SamplingParams
from llmopt.engine.resident import keep_resident
from llmopt.progress import Progress, silent


def bench_engine(
    model: str, workload: Workload, goodput: Mapping[str, float], progress: Progress, **engine_options: Any
) -> dict[str, Any]:
    """Load a model and put a load on it; the object that `llmopt bench MODEL --request-rate --json` writes.

    `engine_options` are settings of `EngineConfig`; `goodput` has limits in milliseconds by metric.
    """
    engine = Engine(EngineConfig(model=model, **engine_options), progress)
    keep_resident()  # as a server does
    traces = run_workload(engine, workload, progress)
    settings = {"model": model, "engine": engine_settings(engine_options), **workload.describe()}
    report = load_report(traces, settings, goodput, gpus=0)
    stats = engine.stats()
    cache = {"queries": stats.prefix_cache_queries, "hits": stats.prefix_cache_hits}
    machine = describe_machine(engine.runner.backend.device)
    return report | {"preemptions": stats.preemptions, "prefix_cache": cache, "machine": machine}


def run_workload(
    engine: Engine, workload: Workload, progress: Progress = silent, phase: str = "requests"
) -> list[RequestTrace]:
    """The warm-ups, all at once, and then the load; a trace for each prompt of the load."""
    warmups, prompts = workload.prompts()
    run_load(engine, warmups, np.zeros(len(warmups)))
    return run_load(engine, prompts, workload.arrivals(), workload.max_concurrency, progress, phase)


def run_load(
    engine: Engine,
    prompts: Sequence[Prompt],
    due: np.ndarray,
    max_concurrency: int | None = None,
    progress: Progress = silent,
    phase: str = "requests",
) -> list[RequestTrace]:
    """Give every prompt to the engine at its time and run it until all have ended; a trace for each, in their order.

    The engine and the clock share a thread, so a request that is due during a step is added after it. It waits no less
    in a server, and its latencies count from when it was due: `sent` is `scheduled`, unless `max_concurrency` held it
    back.

    Args:
        prompts: texts or tokens; the answers are greedy and as long as each prompt asks.
        due: seconds after the start, float64 [len(prompts)], rising.
        max_concurrency: requests in flight at most; with all due at once, whoever gets an answer asks again.
    """
    contents = [
        engine.tokenizer.encode(one.content) if isinstance(one.content, str) else one.content for one in prompts
    ]
    slots = max_concurrency or len(prompts)
    closed_loop = max_concurrency is not None and not due.any()
    start = time.perf_counter()
    traces = [RequestTrace(scheduled=start + offset) for offset in due.tolist()]
    added = ended = 0
    progress(phase, 0, len(traces))
    while ended < len(traces):
        while added < len(traces) and added - ended < slots and traces[added].scheduled <= time.perf_counter():
            trace, prompt = traces[added], prompts[added]
            if closed_loop:
                trace.scheduled = time.perf_counter()
            trace.sent = trace.scheduled if max_concurrency is None else time.perf_counter()
            params = SamplingParams(max_tokens=prompt.max_tokens, temperature=0.0, ignore_eos=True)
            engine.add(str(added), contents[added], params)
            added += 1
        idle = engine.pause if engine.has_work else math.inf
        if idle:
            until = traces[added].scheduled if added < len(traces) else math.inf
            time.sleep(max(0.0, min(idle, until - time.perf_counter())))
            continue
        for delta in engine.step():
            ended += _note(traces[int(delta.request_id)], delta, time.perf_counter())
        progress(phase, ended, len(traces))
    return traces


def _note(trace: RequestTrace, delta: Delta, now: float) -> bool:
    """Write down what a step has added to a request; whether that has ended with it."""
    trace.chunks.append(Chunk(now, len(delta.token_ids)))
    trace.prompt_tokens, trace.output_tokens = delta.prompt_tokens, delta.output_tokens
    trace.finished = now
    return delta.finish_reason is not None
