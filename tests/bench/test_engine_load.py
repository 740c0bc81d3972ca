"""Loads, ablations, profiles and stalls of an engine in this process, over a small model."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest

from llmopt.bench.ablation import ALL_ON, TECHNIQUES, bench_ablation, summarize_rounds
from llmopt.bench.datasets import Prompt
from llmopt.bench.engine_load import bench_engine, run_load
from llmopt.bench.in_process import Case
from llmopt.bench.metrics import Chunk, RequestTrace, itl_ms, scheduled_ttft_ms, ttft_ms
from llmopt.bench.profile import OVERHEAD, PhaseTimes, bench_profile, kv_bytes, profile
from llmopt.bench.stall import stall
from llmopt.bench.workload import Workload
from llmopt.engine.config import EngineConfig
from llmopt.engine.engine import Engine
from llmopt.errors import InputError, LlmoptError
from llmopt.progress import silent

PROMPTS = [Prompt([5] * 9, 4), Prompt([6] * 3, 2), Prompt("the cat", 3)]


@pytest.fixture(scope="module")
def folder(tiny_model) -> str:
    return str(tiny_model("llama")[0])


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch):
    monkeypatch.setattr("llmopt.bench.machine.PROBE_BYTES", 1 << 20)
    monkeypatch.setattr("llmopt.bench.machine.PROBE_SIZE", 64)
    monkeypatch.setattr("llmopt.bench.machine.PROBE_SECONDS", 0.0)


def engine(folder: str, **options) -> Engine:
    return Engine(EngineConfig(model=folder, backend="reference", **{"max_num_seqs": 4} | options))


def test_every_token_of_a_load_is_traced(folder):
    traces = run_load(engine(folder), PROMPTS, np.zeros(3))
    assert [trace.output_tokens for trace in traces] == [4, 2, 3]
    assert [trace.prompt_tokens for trace in traces][:2] == [9, 3]
    for trace in traces:
        assert sum(chunk.tokens for chunk in trace.chunks) == trace.output_tokens
        assert trace.finished == trace.chunks[-1].time
        assert all(gap > 0 for gap in itl_ms(trace))


def test_nobody_is_asked_before_it_is_due_and_waiting_for_a_step_counts(folder, monkeypatch):
    one = engine(folder)
    step = one.step
    monkeypatch.setattr(one, "step", lambda: (time.sleep(0.05), step())[1])
    traces = run_load(one, PROMPTS[:2], np.array([0.0, 0.02]))
    late = traces[1]
    assert late.sent == late.scheduled == pytest.approx(traces[0].scheduled + 0.02)
    assert late.chunks[0].time >= traces[0].chunks[0].time + 0.05, "it came in with the second step"
    assert ttft_ms(late)[0] >= 50


def test_no_more_are_in_flight_than_asked_for(folder, monkeypatch):
    one = engine(folder)
    most = []
    step = one.step
    monkeypatch.setattr(one, "step", lambda: (most.append(len(one._generations)), step())[1])
    traces = run_load(one, PROMPTS, np.zeros(3), max_concurrency=2)
    assert max(most) == 2
    assert all(ttft_ms(trace) == scheduled_ttft_ms(trace) or trace.sent >= trace.scheduled for trace in traces)
    assert traces[2].scheduled >= min(trace.finished for trace in traces[:2])


def test_a_load_waits_for_a_window_without_spinning(folder, monkeypatch):
    one = engine(folder, batching="dynamic", batching_window=100.0)
    steps = []
    step = one.step
    monkeypatch.setattr(one, "step", lambda: (steps.append(1), step())[1])
    traces = run_load(one, PROMPTS[:1], np.zeros(1))
    assert ttft_ms(traces[0])[0] >= 100
    assert len(steps) == PROMPTS[0].max_tokens


def test_the_report_of_a_load(folder):
    workload = Workload(tokenizer=folder, num_prompts=6, input_len=8, output_len=3, random_prefix_len=32)
    report = bench_engine(folder, workload, {"ttft_ms": 6e4}, silent, backend="reference", max_num_seqs=2)
    assert report["requests"]["ok"] == 6
    assert report["output_tokens"] == 18 and report["goodput"] > 0
    assert report["prefix_cache"]["hits"] >= 6 * 32, "the warm-up has computed what all begin with"
    assert report["engine"] == {"backend": "reference", "max_num_seqs": 2}


@pytest.mark.parametrize("tokenizer", [True, False])
def test_random_lengths_vary_within_their_range_after_a_prefix_that_does_not(folder, tokenizer):
    settings = {"input_len": 20, "output_len": 10, "random_range_ratio": 0.5, "random_prefix_len": 4}
    workload = Workload(tokenizer=folder if tokenizer else None, num_prompts=60, **settings)
    warmups, prompts = workload.prompts()
    contents = [one.content if tokenizer else one.content.split() for one in (*warmups, *prompts)]
    assert {tuple(content[:4]) for content in contents} == {tuple(contents[0][:4])}
    lengths = {len(content) - 4 for content in contents}
    assert min(lengths) >= 10 and max(lengths) <= 30 and len(lengths) > 10
    outputs = {one.max_tokens for one in prompts}
    assert min(outputs) >= 5 and max(outputs) <= 15 and len(outputs) > 5


@pytest.mark.parametrize(
    "settings", [{"random_range_ratio": 1.0}, {"random_range_ratio": -0.1}, {"random_prefix_len": -1}]
)
def test_shapes_that_cannot_be_are_refused(settings):
    with pytest.raises(InputError, match="--random-range-ratio must be"):
        Workload(**settings)


def test_an_ablation_has_a_row_for_each_technique_that_is_on(folder, monkeypatch):
    seen: list[EngineConfig] = []
    monkeypatch.setattr("llmopt.bench.ablation.run_workload", lambda one, *rest: (seen.append(one.config), run(one))[1])

    def run(one: Engine) -> list[RequestTrace]:
        return run_load(one, PROMPTS, np.zeros(3))

    workload = Workload(num_prompts=3, request_rate=50.0)
    report = bench_ablation(folder, workload, 2, silent, backend="reference", batching="static", kv_cache_dtype="int8")
    names = [row["name"] for row in report["rows"]]
    assert names == [
        ALL_ON, "prefix caching off", "chunked prefill off", "dynamic batching", "one at a time",
        "KV cache not quantized",
    ]  # fmt: skip
    assert len(seen) == 2 * len(names)
    off = {technique.name: technique.off for technique in TECHNIQUES}
    for config, name in zip(seen, names + names, strict=True):
        for setting, value in off.get(name, {}).items():
            assert getattr(config, setting) == value
        same = {"enable_prefix_caching", "batching", "kv_cache_dtype", "max_num_seqs"} - set(off.get(name, {}))
        assert all(getattr(config, setting) == getattr(seen[0], setting) for setting in same)


def test_an_ablation_finds_a_rate_that_the_engine_can_serve(folder):
    workload = Workload(tokenizer=folder, num_prompts=4, input_len=8, output_len=3)
    report = bench_ablation(folder, workload, 1, silent, backend="reference", max_num_seqs=4)
    assert 0 < report["request_rate"] < math.inf
    assert report["rows"][0]["of_all_on"] == 1.0
    assert all(row["ttft_ms"]["p99"] >= row["ttft_ms"]["p50"] > 0 for row in report["rows"])


def test_rounds_are_summarized_by_their_medians():
    def round(gap: float) -> list[RequestTrace]:
        return [RequestTrace(0.0, 0.0, [Chunk(gap, 1), Chunk(2 * gap, 1)], 2 * gap, 1, 2)]

    found = summarize_rounds([round(1.0), round(8.0), round(2.0)])
    assert found["output_tokens_per_s"] == 0.5
    assert found["ttft_ms"]["p50"] == found["itl_ms"]["p99"] == 2000.0


def test_phases_add_up_to_a_step(folder):
    result = profile(engine(folder), Case(3, 9, 8))
    assert result["steps"] == 7
    assert {phase["name"] for phase in result["phases"]} == {"rest", "build batch", "compute", *OVERHEAD}
    assert sum(phase["ms"] for phase in result["phases"]) == pytest.approx(result["step_ms"])
    assert sum(phase["share"] for phase in result["phases"]) == pytest.approx(1)
    own = sum(phase["share"] for phase in result["phases"] if phase["name"] in OVERHEAD)
    assert result["overhead"] == pytest.approx(own)


def test_a_phase_gets_the_time_since_the_one_before(monkeypatch):
    clock = iter([10.0, 11.0, 13.0, 16.0])
    monkeypatch.setattr("llmopt.bench.profile.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    times = PhaseTimes()
    for phase in ("a", "b", "a"):
        times(phase)
    assert times.seconds == {"a": 1.0 + 3.0, "b": 2.0}


def test_the_bytes_of_a_step_are_those_of_its_weights_and_its_cache(folder, tiny_model):
    one = engine(folder)
    hidden, middle, vocabulary, kv, layers = 64, 96, 320, 32, 3
    weights = layers * (hidden * (hidden + 2 * kv) + hidden * hidden + 3 * hidden * middle) + hidden * vocabulary
    result = profile(one, Case(2, 9, 5))
    assert result["bytes"]["weights"] == 4 * weights
    assert result["bytes"]["kv"] == kv_bytes(one, [12, 12]) == 2 * 12 * layers * 2 * kv * 4
    windowed = engine(str(tiny_model("mistral-window")[0]))
    assert kv_bytes(windowed, [100, 5]) == (16 + 5) * layers * 2 * kv * 4


def test_packed_weights_are_counted_as_they_are_packed(folder):
    pytest.importorskip("llmopt.kernels._cpu")
    report = bench_profile(folder, Case(2, 16, 4), 0, silent, backend="cpu", block_size=16)
    dense = bench_profile(folder, Case(2, 16, 4), 0, silent, backend="reference")["bytes"]["weights"]
    assert 0 < report["bytes"]["weights"] <= dense
    assert report["of_memory_limit"] > 0


def test_one_token_each_is_nothing_to_profile(folder):
    with pytest.raises(LlmoptError, match="never decoded side by side"):
        profile(engine(folder), Case(2, 9, 1))


def test_a_stall_is_timed_from_the_arrival_of_the_prompt(folder, monkeypatch):
    """By a clock that a step moves on by a second for each of its tokens: the worst gap is the largest chunk's."""
    one = engine(folder, max_num_batched_tokens=64, chunked_prefill_size=8, enable_prefix_caching=False)
    schedule = one.scheduler.schedule
    now = 0.0

    def counted() -> list:
        nonlocal now
        chunks = schedule()
        now += sum(chunk.count for chunk in chunks)
        return chunks

    monkeypatch.setattr(one.scheduler, "schedule", counted)
    monkeypatch.setattr("llmopt.bench.stall.time", SimpleNamespace(perf_counter=lambda: now))
    found = stall(one, 2, 40)
    assert (found["median_ms"], found["worst_ms"], found["steps"]) == (2e3, 10e3, 5)
    assert (found["ratio"], found["ttft_ms"]) == (5.0, 50e3)
    assert not one.has_work
    one.check()


def test_streams_that_end_before_the_prompt_are_no_measurement(folder):
    with pytest.raises(LlmoptError, match="no room for all"):
        stall(engine(folder, chunked_prefill_size=1, max_model_len=160), 2, 100)
