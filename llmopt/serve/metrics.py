"""Prometheus metrics under vLLM's names, so that its dashboards work. Only what is measured here is reported.

The latencies are taken where the API process receives the engine's deltas, before they wait for the client to read.
"""

import time
from collections import defaultdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llmopt.engine.outputs import Delta, EngineStats

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
                640, 2560)  # fmt: skip
# vLLM's begin at 10 ms, which would put every token of a fast engine into one bucket; the finer ones come before.
_TOKEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5,
          10, 20, 40, 80)  # fmt: skip
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_LENGTH = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_LABELS = ("model_name", "engine")


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._labels = (model_name, "0")
        self.running = self._gauge("num_requests_running", "Requests in the engine's batch.")
        self.waiting = self._gauge("num_requests_waiting", "Requests waiting for room in the batch.")
        self.cache_usage = self._gauge("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.")
        self._of_engine = {  # by their names in EngineStats, which says how far they have come
            "preemptions": self._counter("num_preemptions", "Requests taken out of the batch for want of KV cache."),
            "prefix_cache_queries": self._counter("prefix_cache_queries", "Prompt tokens looked for in the KV cache."),
            "prefix_cache_hits": self._counter("prefix_cache_hits", "Prompt tokens found in the KV cache."),
        }
        self._of_speculation = {  # the same of SpeculationStats
            "drafts": self._counter("spec_decode_num_drafts", "Drafts that were verified."),
            "draft_tokens": self._counter("spec_decode_num_draft_tokens", "Tokens in them."),
            "accepted_tokens": self._counter("spec_decode_num_accepted_tokens", "Those of them that were accepted."),
        }
        self._by_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted tokens by their place in the draft, the first being 0.",
            (*_LABELS, "position"),
            registry=self._registry,
        )
        self._last: dict[str, int] = defaultdict(int)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that began to answer.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._success = Counter("vllm:request_success", "Finished requests.", (*_LABELS, "finished_reason"),
                                registry=self._registry)  # fmt: skip
        self.first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN)
        self.inter_token = self._histogram("inter_token_latency_seconds", "One token to the next.", _TOKEN)
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "First to last token of a request / (tokens - 1).", _TOKEN
        )
        self.latency = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _REQUEST)
        self.prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a finished request.", _LENGTH)
        self.output_length = self._histogram("request_generation_tokens", "Its generated tokens.", _LENGTH)

    def finished(self, reason: str) -> None:
        """Count a finished request: stop, length or abort."""
        self._success.labels(*self._labels, reason).inc()

    def update(self, stats: EngineStats) -> None:
        """Take over the engine's state."""
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        self.cache_usage.set(stats.kv_cache_usage)
        for name, counter in self._of_engine.items():
            self._advance(name, counter, getattr(stats, name))
        if stats.speculation is not None:
            for name, counter in self._of_speculation.items():
                self._advance(name, counter, getattr(stats.speculation, name))
            for place, count in enumerate(stats.speculation.accepted_by_position):
                labelled = self._by_position.labels(*self._labels, str(place))
                self._advance(f"accepted at {place}", labelled, count)

    def _advance(self, name: str, counter: Counter, now: int) -> None:
        """Let a counter go on to where the engine's own has come."""
        counter.inc(now - self._last[name])
        self._last[name] = now

    def render(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, _LABELS, registry=self._registry).labels(*self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, _LABELS, registry=self._registry).labels(*self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"vllm:{name}", text, _LABELS, buckets=buckets, registry=self._registry)
        return metric.labels(*self._labels)


class RequestTimer:
    """Times one engine request from its arrival on. Times are in seconds of the monotonic clock."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrival = time.perf_counter()
        self._first = self._last = 0.0

    def observe(self, delta: Delta) -> None:
        """Note that a delta has come."""
        metrics, now = self._metrics, time.perf_counter()
        metrics.generation_tokens.inc(len(delta.token_ids))
        if not self._first:
            self._first = now
            metrics.prompt_tokens.inc(delta.prompt_tokens)
            metrics.first_token.observe(now - self._arrival)
        else:
            metrics.inter_token.observe(now - self._last)
        self._last = now
        if delta.finish_reason is not None:
            self._finish(delta)

    def _finish(self, delta: Delta) -> None:
        metrics = self._metrics
        metrics.finished(str(delta.finish_reason))
        metrics.latency.observe(self._last - self._arrival)
        metrics.prompt_length.observe(delta.prompt_tokens)
        metrics.output_length.observe(delta.output_tokens)
        if delta.output_tokens > 1:
            metrics.per_token.observe((self._last - self._first) / (delta.output_tokens - 1))
