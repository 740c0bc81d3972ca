"""The documented objects that `llmopt bench --json` writes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from llmopt.bench import metrics
from llmopt.bench.metrics import RequestTrace
from llmopt.errors import LlmoptError

if TYPE_CHECKING:  # it imports torch, which a load generator does without
    from llmopt.bench.in_process import Measurement

VERSION = 1


def engine_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `EngineConfig` as a report has them: what is an object of its own becomes one of JSON's."""
    return {
        name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for name, value in options.items()
    }


def in_process_report(
    model: str, weight_bytes: int, machine: Mapping[str, Any], measurements: Sequence["Measurement"]
) -> dict[str, Any]:
    """The result of a grid: a prefill run for each case, and a decode run where more than one token was asked for.

    A decode run says how near it came to the memory's limit, batch * bandwidth / weight_bytes: every step reads the
    model's files once and gives each request a token. Reading the KV cache is not in it, nor that a backend may hold
    the weights larger than the files do. Where tokens are drafted it says what became of them, `SpeculationStats`; then
    a step may give more than one, and the limit is none.
    """
    bandwidth = 1e9 * machine["memory_gb_per_s"]
    runs: list[dict[str, Any]] = []
    for measurement in measurements:
        case = measurement.case
        shape = {"batch": case.batch, "prompt_len": case.prompt_len, "gen_len": case.gen_len}
        speeds, ttft = spread(measurement.prefill_tokens_per_s), spread(measurement.ttft_ms)
        runs.append({"phase": "prefill", **shape, "tokens_per_s": speeds, "ttft_ms": ttft})
        if measurement.decode_tokens_per_s:
            speeds, limit = spread(measurement.decode_tokens_per_s), case.batch * bandwidth / weight_bytes
            limits = {"memory_limit_tokens_per_s": limit, "of_memory_limit": speeds["median"] / limit}
            runs.append({"phase": "decode", **shape, "tokens_per_s": speeds, **limits})
            if measurement.speculation is not None:
                runs[-1]["speculation"] = asdict(measurement.speculation)
    return {
        "version": VERSION,
        "model": model,
        "weight_bytes": weight_bytes,
        "machine": dict(machine),
        "runs": runs,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the rounds."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def load_report(
    traces: Sequence[RequestTrace], settings: Mapping[str, Any], limits: Mapping[str, float], gpus: int
) -> dict[str, Any]:
    """The result of a load on a server.

    Args:
        settings: how the load was made, for the report to repeat.
        limits: of goodput, milliseconds by metric; empty for none.
        gpus: of the server; 0 for none.

    Raises LlmoptError where every request failed, so that nothing was measured.
    """
    answered = sum(trace.ok for trace in traces)
    errors = Counter(trace.error for trace in traces if trace.error is not None)
    if not answered:
        error, times = errors.most_common(1)[0]
        raise LlmoptError(f"all {len(traces)} requests failed, {times} of them with: {error}")
    seconds = max(trace.finished for trace in traces) - min(trace.sent for trace in traces)
    return {
        "version": VERSION,
        **settings,
        "requests": {"total": len(traces), "ok": answered, "failed": len(traces) - answered},
        "errors": dict(errors.most_common()),
        "token_counting": dict(Counter(trace.counting for trace in traces if trace.ok)),
        "seconds": seconds,
        "prompt_tokens": sum(trace.prompt_tokens for trace in traces if trace.ok),
        "output_tokens": sum(trace.output_tokens for trace in traces if trace.ok),
        "output_tokens_per_s": metrics.output_tokens_per_s(traces, seconds),
        "output_tokens_per_s_per_gpu": metrics.output_tokens_per_s_per_gpu(traces, seconds, gpus) if gpus else None,
        "tokens_per_s_per_user": metrics.tokens_per_s_per_user(traces),
        "goodput": metrics.goodput(traces, limits, seconds) if limits else None,
        **{name: metrics.summarize_latency(name, traces) for name in metrics.LATENCIES},
        "meanings": metrics.meanings(),
    }
