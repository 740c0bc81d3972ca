"""The comparison's own code: reading the engines' reports, ratios, the table, whose turn it is. No peer is run here."""

import json
import sys

import pytest
from bench_artifacts import run
from bench_engines import Ways, read_batched_bench, read_llama_bench, read_llmopt_bench, read_vllm_speed
from bench_peers import HTTP_ROWS, LARGE_ROWS, SMALL_ROWS, chosen, make_artifacts
from bench_programs import file_name
from bench_rows import Case, Row, Speed, markdown, row_result
from bench_turns import Turns, name_of, time_left

from llmopt.errors import LlmoptError

PREFILL, DECODE = Case(1, 512, 0), Case(16, 128, 128)
HTTP = Case(16, 128, 64, "a-client")
ROW = Row("m", DECODE, "llmopt-a", ("p", "q"), "any width")


REPORT = {
    "machine": {"cpu": "a CPU", "cores": 2, "memory_gb_per_s": 29.04, "float32_gflops": 150.2},
    "rounds": 3,
    "busy_elsewhere": {"median": 1.0, "max": 12.0},
    "engines": [
        {"model": "m", "engine": "llmopt-a", "weight_bytes": 91_700_000, "head": "Q8_0", "settings": "as it is"}
    ],
}


def turns(*speeds: float) -> list[Speed]:
    return [Speed(speed) for speed in speeds]


def test_llama_bench_counts_by_its_median_repeat():
    test = {"n_prompt": 512, "n_gen": 0, "avg_ts": 90.0, "samples_ts": [100.0, 110.0, 60.0]}
    assert read_llama_bench(json.dumps([test])) == 100.0


def test_batched_bench_counts_by_its_generation_speed_whatever_is_logged_around_it():
    line = {"pp": 128, "tg": 128, "pl": 16, "t_pp": 2.0, "speed_pp": 1024.0, "t_tg": 4.0, "speed_tg": 512.0}
    assert read_batched_bench(f"\nloading\n{json.dumps(line)}\n\ndone\n") == 512.0


def test_llmopt_counts_by_the_phase_of_the_case():
    speeds = {"prefill": 900.0, "decode": 70.0}
    runs = [{"phase": phase, "tokens_per_s": {"median": speed}} for phase, speed in speeds.items()]
    report = json.dumps({"runs": runs})
    assert read_llmopt_bench(report, PREFILL) == 900.0
    assert read_llmopt_bench(report, DECODE) == 70.0


def test_vllm_counts_by_the_median_of_its_seconds():
    answer = [[2.0, 4.0, 2048], [1.0, 2.0, 2048], [4.0, 8.0, 2040]]
    assert read_vllm_speed(answer, PREFILL) == 512 / 2.0
    assert read_vllm_speed(answer, DECODE) == 2048 / 4.0


def test_a_failed_command_is_named_with_its_last_words():
    command = [sys.executable, "-c", "import sys; print('no such model', file=sys.stderr); sys.exit(4)"]
    with pytest.raises(LlmoptError, match=r"sys\.exit\(4\) failed with status 4: .*no such model"):
        run(command)


def test_a_command_that_hangs_is_given_up():
    with pytest.raises(LlmoptError, match=r"sleep\(60\) was not done within 0\.2 s"):
        run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)


def test_a_ratio_is_of_medians_and_to_the_best_peer():
    measured = {
        ("m", DECODE, "llmopt-a"): turns(100.0, 300.0, 310.0),
        ("m", DECODE, "p"): turns(50.0, 60.0, 900.0),
        ("m", DECODE, "q"): turns(200.0, 150.0, 140.0),
    }
    row = row_result(ROW, measured, weight_bytes=10**8, bandwidth=1e10)
    assert row["llmopt"] == 300.0 and row["peers"] == {"p": 60.0, "q": 150.0}
    assert row["best_peer"] == "q" and row["ratio"] == 2.0
    assert row["range"]["p"] == {"min": 50.0, "max": 900.0}
    assert row["of_memory_limit"] == pytest.approx(300 / (16 * 100))
    assert row["case"] == "decode-16" and row["requests"] == {}


def test_a_row_without_one_of_its_engines_is_no_row():
    measured = {("m", DECODE, "llmopt-a"): turns(100.0), ("m", DECODE, "p"): turns(50.0), ("m", DECODE, "q"): []}
    assert row_result(ROW, measured, 1, 1.0) is None


def test_prefill_has_no_limit_by_memory():
    row = Row("m", PREFILL, "llmopt-a", ("p",), "8 bits")
    measured = {("m", PREFILL, "llmopt-a"): turns(2.0), ("m", PREFILL, "p"): turns(4.0)}
    assert row_result(row, measured, 1, 1.0)["of_memory_limit"] is None


def test_requests_through_http_count_with_those_that_failed():
    row = Row("m", HTTP, "llmopt-serve-a", ("p", "q"), "any width")
    measured = {
        ("m", HTTP, "llmopt-serve-a"): [Speed(900.0, 64), Speed(800.0, 64)],
        ("m", HTTP, "p"): [Speed(100.0, 64, {"reset": 5, "refused": 1}), Speed(120.0, 64, {"reset": 1})],
        ("m", HTTP, "q"): [Speed(90.0, 64, {"reset": 2}), Speed(90.0, 64)],
    }
    made = row_result(row, measured, 10**8, 1e10)
    assert made["case"] == "http-16/a-client" and made["of_memory_limit"] is None
    assert made["requests"]["llmopt-serve-a"] == {"total": 128, "failed": 0}
    assert made["requests"]["p"] == {"total": 128, "failed": 7}
    table = markdown(REPORT | {"rows": [made]})
    assert "| p | 110 (100–120), 7 of 128 requests failed | **7.73** | q 90, 2 of 128 requests failed |" in table
    assert "| llmopt-serve-a | 850 (800–900) |" in table


def test_a_row_may_have_a_name_of_its_own():
    row = Row("m", HTTP, "llmopt-serve-a", ("llmopt-in-process-a",), "in process", title="http-16/of-in-process")
    measured = {
        ("m", HTTP, "llmopt-serve-a"): [Speed(900.0, 64)],
        ("m", HTTP, "llmopt-in-process-a"): turns(1000.0),
    }
    made = row_result(row, measured, 1, 1.0)
    assert (made["case"], made["ratio"]) == ("http-16/of-in-process", 0.9)
    assert made["requests"] == {"llmopt-serve-a": {"total": 64, "failed": 0}}


def test_the_table_has_a_line_for_each_row_and_engine():
    measured = {
        ("m", DECODE, engine): turns(speed) for engine, speed in (("llmopt-a", 1500.0), ("p", 500.0), ("q", 400.0))
    }
    table = markdown(REPORT | {"rows": [row_result(ROW, measured, 10**8, 1e10)]})
    assert (
        "| m | decode-16 | llmopt-a | 1,500 (1,500–1,500) | 94% | any width | p | 500 (500–500) | **3.00** | q 400 |"
        in table
    )
    assert "| m | llmopt-a | 91.7 | Q8_0 | as it is |" in table
    assert "reads 29.0 GB/s" in table and "12%" in table


def test_only_chooses_by_parts_of_names_and_measures_nothing_twice():
    everything = chosen(SMALL_ROWS + LARGE_ROWS, [])
    assert len(everything) == len(set(everything)) == 4 * 7 + 1 + 3 * 2
    assert [name_of(each) for each in chosen(SMALL_ROWS, ["decode-1/vllm"])] == ["SmolLM2-135M/decode-1/vllm-bf16"]
    assert {case.name for _, case, _ in chosen(SMALL_ROWS, ["w8a8"])} == {"prefill-512"}


def test_only_http_chooses_servers_and_what_they_are_compared_with():
    wanted = chosen(SMALL_ROWS + HTTP_ROWS, ["http"])
    programs = ("llmopt-serve", "llmopt-in-process")
    kinds = [f"{program}-{kind}" for program in programs for kind in ("q4_0", "gptq", "gptq-head8")]
    assert {engine for _, _, engine in wanted} == {*kinds, "llama-server-Q4_0", "vllm-serve-bf16"}
    assert {case.name for _, case, _ in wanted} == {"http-16/vllm-bench-serve", "http-16/llmopt-bench"}
    assert len(wanted) == len(set(wanted)) == 2 * 8
    assert not any("http" in name_of(each) for each in chosen(SMALL_ROWS, []))


def test_a_server_runs_the_file_that_is_given_for_its_family(tmp_path):
    assert file_name("llama-server-Q4_0") == "llama.cpp-Q4_0"
    assert file_name("llmopt-serve-gptq-head8") == file_name("llmopt-gptq-head8") == "llmopt-gptq-head8"
    engines = ("llmopt-serve-gptq", "llmopt-in-process-gptq", "llmopt-gptq")
    wanted = [("m", HTTP, engine) for engine in engines]
    assert make_artifacts(wanted, {"llmopt-gptq": tmp_path}, None) == {("m", engine): tmp_path for engine in engines}


def test_the_first_run_tries_all_ways_and_the_others_only_the_fastest():
    speeds, ran = {"a": 1.0, "b": 3.0, "c": 2.0}, []

    def run(way: str) -> Speed:
        ran.append(way)
        return Speed(speeds[way])

    ways = Ways("a", "b", "c")
    assert ways.run("decode-1", run) == Speed(3.0)
    speeds["b"] = 0.5
    assert ways.run("decode-1", run) == Speed(0.5)
    assert ran == ["a", "b", "c", "b"] and str(ways) == "b in decode-1"


def test_time_left_takes_what_is_known_and_the_average_of_the_others():
    first, second, third = ("m", PREFILL, "a"), ("m", PREFILL, "b"), ("m", DECODE, "a")
    assert time_left({first: [10.0, 20.0], second: [5.0]}, [first, third]) == 15.0 + 10.0
    assert time_left({}, [first]) == 0.0


class Stub:
    settings = "a stub"

    def __init__(self, *speeds: float) -> None:
        self.speeds = list(speeds)

    def measure(self, case: Case) -> Speed:
        if not self.speeds:
            raise LlmoptError("out of speeds")
        return Speed(self.speeds.pop(0), requests=64, failed={"reset": 3})

    def close(self) -> None:
        pass


def test_engines_take_turns_and_one_that_failed_is_not_asked_again(monkeypatch, capsys):
    monkeypatch.setattr("bench_turns.WITNESS_SECONDS", 0.0)
    steady, failing = ("m", PREFILL, "steady"), ("m", PREFILL, "failing")
    taken = Turns({("m", "steady"): Stub(1.0, 2.0, 3.0), ("m", "failing"): Stub(9.0)}, [steady, failing], rounds=3)
    for _ in range(3):
        taken.take_round()
    speeds = {each: [speed.tokens_per_s for speed in shown] for each, shown in taken.speeds.items()}
    assert speeds == {steady: [1.0, 2.0, 3.0], failing: [9.0]}
    assert taken.failures == {failing: "out of speeds"}
    assert len(taken.busy_elsewhere) == 5  # it failed in the second round and was left out in the third
    said = capsys.readouterr().err
    assert "m/prefill-512/steady: 1.0 tokens/s, 3 of 64 requests failed, others used" in said
    assert "m/prefill-512/failing: out of speeds; about 0.0 min left" in said
