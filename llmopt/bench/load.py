"""Puts load on a server of OpenAI's completions API and keeps a trace of every request."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import aiohttp
import numpy as np

from llmopt.bench.datasets import Prompt
from llmopt.bench.metrics import RequestTrace
from llmopt.bench.report import load_report
from llmopt.bench.stream import Target, complete, open_session
from llmopt.bench.workload import Workload
from llmopt.errors import LlmoptError

Watch = Callable[[RequestTrace], None]


async def bench_server(target: Target, workload: Workload, goodput: dict[str, float], watch: Watch) -> dict[str, Any]:
    """Put a load on a server; the object that `llmopt bench --base-url --json` writes.

    `goodput` has limits in milliseconds by metric, `watch` is called with each request's trace when it has ended.
    Raises InputError for settings that cannot be, LlmoptError where the server does not answer.
    """
    warmups, prompts = workload.prompts()
    traces = await run_load(target, prompts, workload.arrivals(), workload.max_concurrency, warmups, watch)
    settings = {"base_url": target.base_url, "model": target.model, **workload.describe()}
    return load_report(traces, settings, goodput, workload.num_gpus)


async def run_load(
    target: Target,
    prompts: Sequence[Prompt],
    due: np.ndarray,
    max_concurrency: int | None,
    warmups: Sequence[Prompt],
    watch: Watch,
) -> list[RequestTrace]:
    """Send every prompt at its time and wait for all answers.

    Args:
        due: seconds after the start, float64 [len(prompts)], rising.
        max_concurrency: requests in flight at most; the others wait in the client, which the scheduled latencies show.
        warmups: sent one after the other before the clock starts; prompts that are not measured.
        watch: called with each trace when its request has ended.

    Returns:
        A trace for each prompt, in their order, whether it was answered or failed.

    Raises LlmoptError where the server answers no warm-up.
    """
    async with open_session(target) as session:
        target = await _warm_up(session, target, warmups)
        slots = asyncio.Semaphore(max_concurrency or len(prompts))
        closed_loop = max_concurrency is not None and not due.any()
        start = time.perf_counter()
        traces = [RequestTrace(scheduled=start + offset) for offset in due.tolist()]

        async def one(prompt: Prompt, trace: RequestTrace) -> None:
            await asyncio.sleep(max(0.0, trace.scheduled - time.perf_counter()))
            async with slots:
                if closed_loop:  # a user who waits for the last answer before asking again
                    trace.scheduled = time.perf_counter()
                await complete(session, target, prompt, trace)
            watch(trace)

        await asyncio.gather(*(one(prompt, trace) for prompt, trace in zip(prompts, traces, strict=True)))
    return traces


async def _warm_up(session: aiohttp.ClientSession, target: Target, prompts: Sequence[Prompt]) -> Target:
    """Send the warm-ups, and find out whether the server refuses to count tokens in every chunk."""
    for prompt in prompts:
        trace = RequestTrace(scheduled=time.perf_counter())
        await complete(session, target, prompt, trace)
        if trace.error is not None and trace.error.startswith("HTTP 4") and target.counts_each_chunk:
            target = replace(target, counts_each_chunk=False)
            trace = RequestTrace(scheduled=time.perf_counter())
            await complete(session, target, prompt, trace)
        if trace.error is not None:
            raise LlmoptError(f"{target.completions_url} does not answer the warm-up request: {trace.error}")
    return target
