import json

import pytest

from llmopt.bench.in_process import Case, Measurement, Round
from llmopt.bench.metrics import Chunk, RequestTrace, meanings
from llmopt.bench.report import in_process_report, load_report
from llmopt.errors import LlmoptError


def answered(start: float, *times: float) -> RequestTrace:
    return RequestTrace(start, start, [Chunk(time, 1) for time in times], times[-1], 3, len(times))


def failed(start: float, error: str) -> RequestTrace:
    return RequestTrace(start, start, finished=start + 1, error=error)


def test_a_load_accounts_for_every_request():
    traces = [answered(0.0, 1.0, 1.5), answered(1.0, 2.0, 4.0), failed(0.5, "cut"), failed(0.5, "cut")]
    report = load_report(traces, {"model": "m"}, {"ttft_ms": 5000.0}, gpus=2)
    assert report["requests"] == {"total": 4, "ok": 2, "failed": 2}
    assert report["errors"] == {"cut": 2}
    assert report["seconds"] == 4.0
    assert (report["prompt_tokens"], report["output_tokens"]) == (6, 4)
    assert (report["output_tokens_per_s"], report["output_tokens_per_s_per_gpu"]) == (1.0, 0.5)
    assert report["goodput"] == 0.5
    assert report["itl_ms"]["mean"] == pytest.approx(1250)
    assert (report["version"], report["model"]) == (1, "m")
    assert set(meanings()) <= set(report)
    json.dumps(report, allow_nan=False)


def test_what_was_not_asked_for_or_measured_is_null():
    report = load_report([answered(0.0, 1.0)], {}, {}, gpus=0)
    assert report["goodput"] is report["output_tokens_per_s_per_gpu"] is report["itl_ms"] is report["tpot_ms"] is None


def test_nothing_is_measured_where_everything_failed():
    traces = [failed(0.0, "busy"), failed(0.0, "busy"), failed(0.0, "cut")]
    with pytest.raises(LlmoptError, match="all 3 requests failed, 2 of them with: busy") as raised:
        load_report(traces, {}, {}, gpus=0)
    assert raised.value.exit_status == 3


def test_a_grid_has_a_run_for_each_phase_that_took_place():
    long = Measurement(Case(2, 100, 11), [Round(1.0, 2.0, 20), Round(2.0, 1.0, 20), Round(4.0, 4.0, 20)])
    short = Measurement(Case(1, 100, 1), [Round(1.0, 0.0, 0)])
    report = in_process_report("m", 10**8, {"memory_gb_per_s": 2.0}, [long, short])
    prefill, decode, alone = report["runs"]
    assert prefill["tokens_per_s"] == {"median": 100, "min": 50, "max": 200}
    assert prefill["ttft_ms"] == {"median": 2000, "min": 1000, "max": 4000}
    assert decode["tokens_per_s"] == {"median": 10, "min": 5, "max": 20}
    assert decode["memory_limit_tokens_per_s"] == 40 and decode["of_memory_limit"] == 0.25
    assert [run["phase"] for run in report["runs"]] == ["prefill", "decode", "prefill"]
    assert (alone["batch"], alone["prompt_len"], alone["gen_len"]) == (1, 100, 1)
    json.dumps(report, allow_nan=False)
