"""What each latency and throughput number means: one small pure function each, whose docstring is its definition.

Times are monotonic seconds of one clock; latencies come out in milliseconds. Nothing here reads a clock, a file or
the network, so that every formula can be checked by hand.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import cleandoc
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from llmopt.errors import InputError

Counting = Literal["each chunk", "shared out", "one a chunk"]


class Chunk(NamedTuple):
    """A piece of a stream: when it arrived, and how many tokens it brought (at least 1)."""

    time: float
    tokens: int


@dataclass
class RequestTrace:
    """What happened to one request.

    Attributes:
        scheduled: when it was due; in a closed loop, when its slot became free.
        sent: when it was sent, never before `scheduled`.
        chunks: what arrived, in order.
        finished: when the stream ended or the request failed.
        prompt_tokens, output_tokens: as the server counted them.
        counting: how it is known which chunk brought how many tokens. "each chunk": the server said so with each.
            "shared out": it said only how many there were, and they are spread evenly over the chunks that brought
            text. "one a chunk": it said nothing, and one token a chunk is assumed.
        error: why it failed, None for a request that was answered whole.
    """

    scheduled: float
    sent: float = 0.0
    chunks: list[Chunk] = field(default_factory=list)
    finished: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    counting: Counting = "each chunk"
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None


def ttft_ms(trace: RequestTrace) -> list[float]:
    """Time to first token: arrival of the first chunk with a token - sending. Milliseconds, lower is better."""
    return [1e3 * (trace.chunks[0].time - trace.sent)] if trace.chunks else []


def itl_ms(trace: RequestTrace) -> list[float]:
    """Inter-token latency: gaps between the tokens of a stream, pooled over all requests. A chunk of k tokens that
    comes t after the one before it counts as k gaps of t / k; the first chunk counts in TTFT only. Milliseconds, lower
    is better."""
    gaps: list[float] = []
    for before, chunk in zip(trace.chunks, trace.chunks[1:], strict=False):
        gaps += [1e3 * (chunk.time - before.time) / chunk.tokens] * chunk.tokens
    return gaps


def tpot_ms(trace: RequestTrace) -> list[float]:
    """Time per output token: (end to end - TTFT) / (N - 1) for each request of N > 1 output tokens. Milliseconds,
    lower is better."""
    if trace.output_tokens < 2 or not trace.chunks:
        return []
    return [(e2e_ms(trace)[0] - ttft_ms(trace)[0]) / (trace.output_tokens - 1)]


def e2e_ms(trace: RequestTrace) -> list[float]:
    """End-to-end latency: arrival of the last token - sending. Milliseconds, lower is better."""
    return [1e3 * (trace.chunks[-1].time - trace.sent)] if trace.chunks else []


def scheduled_ttft_ms(trace: RequestTrace) -> list[float]:
    """TTFT from the moment the request was due, not from its sending, so that waiting in the client is not hidden
    (coordinated omission). Milliseconds, lower is better."""
    return [1e3 * (trace.chunks[0].time - trace.scheduled)] if trace.chunks else []


def scheduled_e2e_ms(trace: RequestTrace) -> list[float]:
    """End-to-end latency from the moment the request was due, not from its sending. Milliseconds, lower is better."""
    return [1e3 * (trace.chunks[-1].time - trace.scheduled)] if trace.chunks else []


LATENCIES: dict[str, Callable[[RequestTrace], list[float]]] = {
    metric.__name__: metric for metric in (ttft_ms, itl_ms, tpot_ms, e2e_ms, scheduled_ttft_ms, scheduled_e2e_ms)
}


def output_tokens_per_s(traces: Sequence[RequestTrace], seconds: float) -> float:
    """Output tokens of the requests answered whole / seconds from the first sending to the last end. Higher is
    better."""
    return sum(trace.output_tokens for trace in traces if trace.ok) / seconds


def output_tokens_per_s_per_gpu(traces: Sequence[RequestTrace], seconds: float, gpus: int) -> float:
    """Output tokens per second / GPUs of the server; a server without a GPU counts as one. Higher is better."""
    return output_tokens_per_s(traces, seconds) / max(gpus, 1)


def tokens_per_s_per_user(traces: Sequence[RequestTrace]) -> float | None:
    """The speed at which one user sees text grow: 1000 / TPOT of each request, averaged over the requests. Tokens per
    second, higher is better; null where no request had two tokens."""
    speeds = [1e3 / tpot for trace in traces if trace.ok for tpot in tpot_ms(trace) if tpot > 0]
    return float(np.mean(speeds)) if speeds else None


def goodput(traces: Sequence[RequestTrace], limits: Mapping[str, float], seconds: float) -> float:
    """Requests answered whole that keep every limit of --goodput / seconds. Requests per second, higher is better."""
    return sum(trace.ok and _keeps(trace, limits) for trace in traces) / seconds


def _keeps(trace: RequestTrace, limits: Mapping[str, float]) -> bool:
    return all(value <= limit for name, limit in limits.items() for value in LATENCIES[name](trace))


THROUGHPUTS = (output_tokens_per_s, output_tokens_per_s_per_gpu, tokens_per_s_per_user, goodput)

_LIMITED = {"ttft": "ttft_ms", "tpot": "tpot_ms", "e2el": "e2e_ms"}


def parse_goodput(words: Sequence[str]) -> dict[str, float]:
    """The limits of `--goodput ttft:500 tpot:50` (vLLM's words; milliseconds), by the name of their metric.

    Raises InputError for a word of another form.
    """
    limits: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = -1.0
        if name not in _LIMITED or not 0 < limit < float("inf"):
            raise InputError(f"--goodput {word} is not NAME:MILLISECONDS with a NAME of {', '.join(_LIMITED)}")
        limits[_LIMITED[name]] = limit
    return limits


def summarize(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles 50, 90 and 99, interpolated linearly between the two nearest values (Hyndman and Fan 1996,
    type 7); None of no values."""
    if not len(values):
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {"mean": float(np.mean(values)), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def summarize_latency(name: str, traces: Sequence[RequestTrace]) -> dict[str, float] | None:
    """A metric of LATENCIES, summarized over the requests that were answered whole."""
    return summarize([value for trace in traces if trace.ok for value in LATENCIES[name](trace)])


def meanings() -> dict[str, str]:
    """The definition of every metric, as reports print it."""
    metrics: list[Callable] = [*LATENCIES.values(), *THROUGHPUTS]
    return {metric.__name__: " ".join(cleandoc(metric.__doc__ or "").split()) for metric in metrics}


def share_out(tokens: int, chunks: int) -> list[int]:
    """Tokens spread over chunks as evenly as whole numbers allow, for a server that says only their sum. The first
    chunk never has less than another, so that it is the one that TTFT ends with."""
    edges = [-(-tokens * i // chunks) for i in range(chunks + 1)]
    return [after - before for before, after in pairwise(edges)]
