"""Every formula against traces whose numbers can be worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.bench import metrics
from llmopt.bench.metrics import Chunk, RequestTrace
from llmopt.errors import InputError


def trace(*chunks: tuple[float, int], scheduled: float = 9.0, sent: float = 10.0, error: str | None = None):
    arrived = [Chunk(*chunk) for chunk in chunks]
    tokens = sum(chunk.tokens for chunk in arrived)
    finished = arrived[-1].time if arrived else sent
    return RequestTrace(scheduled, sent, arrived, finished, prompt_tokens=5, output_tokens=tokens, error=error)


def test_latencies_of_one_token_a_chunk():
    one = trace((10.5, 1), (10.6, 1), (10.9, 1))
    assert metrics.ttft_ms(one) == pytest.approx([500])
    assert metrics.itl_ms(one) == pytest.approx([100, 300])
    assert metrics.tpot_ms(one) == pytest.approx([200])
    assert metrics.e2e_ms(one) == pytest.approx([900])
    assert metrics.scheduled_ttft_ms(one) == pytest.approx([1500])
    assert metrics.scheduled_e2e_ms(one) == pytest.approx([1900])


def test_a_chunk_of_several_tokens_is_several_gaps():
    assert metrics.itl_ms(trace((10.5, 2), (10.9, 4))) == pytest.approx([100] * 4)


def test_a_single_token_has_no_gap_and_no_time_per_token():
    one = trace((10.5, 1))
    assert metrics.itl_ms(one) == [] and metrics.tpot_ms(one) == []
    assert metrics.e2e_ms(one) == metrics.ttft_ms(one)


def test_an_answer_without_a_token_has_no_latency():
    assert all(metric(trace()) == [] for metric in metrics.LATENCIES.values())


@given(st.lists(st.tuples(st.floats(0.001, 1), st.integers(1, 5)), min_size=2, max_size=20))
def test_the_gaps_add_up_to_the_time_between_first_and_last_chunk(steps):
    times = 10 + np.cumsum([step for step, _ in steps])
    one = trace(*zip(times.tolist(), [tokens for _, tokens in steps], strict=True))
    assert sum(metrics.itl_ms(one)) == pytest.approx(metrics.e2e_ms(one)[0] - metrics.ttft_ms(one)[0])
    assert len(metrics.itl_ms(one)) == one.output_tokens - steps[0][1]


def test_throughput_counts_only_what_was_answered_whole():
    traces = [trace((10.5, 1), (10.6, 1)), trace((10.5, 1), (10.7, 1)), trace((10.5, 90), error="cut off")]
    assert metrics.output_tokens_per_s(traces, 2.0) == pytest.approx(2.0)
    assert metrics.output_tokens_per_s_per_gpu(traces, 2.0, gpus=4) == pytest.approx(0.5)
    assert metrics.output_tokens_per_s_per_gpu(traces, 2.0, gpus=0) == pytest.approx(2.0)
    assert metrics.tokens_per_s_per_user(traces) == pytest.approx((10 + 5) / 2)
    assert metrics.tokens_per_s_per_user([trace((10.5, 1))]) is None
    assert metrics.summarize_latency("e2e_ms", traces)["mean"] == pytest.approx(650)


def test_goodput_needs_every_limit_kept():
    fast, slow_start, slow_end = trace((10.1, 1), (10.2, 1)), trace((10.6, 1), (10.7, 1)), trace((10.1, 1), (10.9, 1))
    failed = trace((10.1, 1), (10.2, 1), error="cut off")
    limits = metrics.parse_goodput(["ttft:500", "tpot:200"])
    assert limits == {"ttft_ms": 500, "tpot_ms": 200}
    assert metrics.goodput([fast, slow_start, slow_end, failed], limits, seconds=0.5) == 2.0
    assert metrics.goodput([fast, slow_start, slow_end, failed], {"e2e_ms": 750}, seconds=0.5) == 4.0


@pytest.mark.parametrize("word", ["ttft", "ttft:", "ttft:-1", "itl:5", "ttft:nan", "ttft:inf", "e2e:5"])
def test_a_goodput_limit_of_another_form_is_refused(word):
    with pytest.raises(InputError, match="ttft, tpot, e2el"):
        metrics.parse_goodput([word])


def test_percentiles_interpolate_linearly():
    summary = metrics.summarize([1, 2, 3, 4, 5])
    assert summary == {"mean": 3, "p50": 3, "p90": pytest.approx(4.6), "p99": pytest.approx(4.96)}
    assert metrics.summarize([]) is None


@given(st.integers(0, 1000), st.integers(1, 50))
def test_shares_add_up_and_differ_by_one_at_most(tokens, chunks):
    shares = metrics.share_out(tokens, chunks)
    assert len(shares) == chunks and sum(shares) == tokens
    assert max(shares) - min(shares) <= 1


def test_every_metric_says_its_unit_and_direction():
    for name, meaning in metrics.meanings().items():
        assert "\n" not in meaning
        assert "lower is better" in meaning.lower() or "higher is better" in meaning.lower(), name
        assert "second" in meaning, name
