import numpy as np
import pytest
import torch

from llmopt.bench.in_process import Case, bench_model, grid, measure, run_round, weight_bytes
from llmopt.bench.machine import cpu_name, describe_machine, float32_flops, read_bandwidth
from llmopt.engine.config import EngineConfig
from llmopt.engine.engine import Engine
from llmopt.engine.speculation.config import SpeculativeConfig
from llmopt.errors import InputError, LlmoptError
from llmopt.progress import silent


@pytest.fixture(scope="module")
def folder(tiny_model) -> str:
    return str(tiny_model("llama")[0])


def engine(folder: str, **options) -> Engine:
    return Engine(EngineConfig(model=folder, backend="reference", **{"max_num_seqs": 4, "max_model_len": 64} | options))


def test_the_grid_is_every_combination():
    assert len(grid([1, 2], [3], [4, 5])) == 4
    assert grid([8], [2], [1]) == [Case(batch=1, prompt_len=8, gen_len=2)]
    with pytest.raises(InputError, match="--batch needs numbers of at least 1"):
        grid([8], [2], [0])


def test_every_token_after_prefill_is_counted(folder):
    measured = run_round(engine(folder), Case(3, 16, 5), np.random.default_rng(0), "r")
    assert measured.prefill_s > 0 and measured.decode_s > 0
    assert measured.decode_tokens == 3 * (5 - 1)


def test_tokens_decoded_while_others_are_in_prefill_do_not_count_as_decode(folder):
    small_steps = engine(folder, max_num_batched_tokens=20)
    measured = run_round(small_steps, Case(4, 16, 12), np.random.default_rng(0), "r")
    assert 0 < measured.decode_tokens < 4 * (12 - 1)
    small_steps.check()


def test_rounds_use_prompts_that_no_other_round_has_seen(folder, monkeypatch):
    one = engine(folder)
    seen: list[tuple[int, ...]] = []
    add = one.add
    monkeypatch.setattr(
        one, "add", lambda name, prompt, params: (seen.append(tuple(prompt)), add(name, prompt, params))
    )
    (measurement,) = measure(one, [Case(2, 10, 2)], repeats=3)
    assert len(measurement.rounds) == 3
    assert len(seen) == len(set(seen)) == 2 * (3 + 1)


def test_a_case_larger_than_the_cache_is_refused_before_anything_runs(folder):
    one = engine(folder, max_model_len=32, kv_cache_memory_bytes=2 * 3 * 2 * 16 * 4 * 48)  # three blocks of 16 tokens
    assert one.stats().total_blocks == 3
    with pytest.raises(InputError, match="need 4 cache blocks of 16 tokens at once and there are 3"):
        measure(one, [Case(1, 4, 2), Case(2, 20, 10)], repeats=1)
    assert one.stats().steps == 0


def test_a_preempted_round_is_no_measurement(folder):
    one = engine(folder, max_model_len=32, kv_cache_memory_bytes=2 * 3 * 2 * 16 * 4 * 48)
    with pytest.raises(LlmoptError, match="preempted"):
        run_round(one, Case(2, 14, 10), np.random.default_rng(0), "r")


def test_no_rounds_are_refused(folder):
    with pytest.raises(InputError, match="--repeats"):
        measure(engine(folder), [Case(1, 4, 2)], repeats=0)


def test_the_whole_report(folder, monkeypatch):
    monkeypatch.setattr("llmopt.bench.machine.PROBE_BYTES", 1 << 20)
    monkeypatch.setattr("llmopt.bench.machine.PROBE_SIZE", 64)
    cases = grid([8], [1, 4], [2])
    report = bench_model(folder, cases, repeats=2, seed=0, progress=silent, backend="reference")
    assert [(run["phase"], run["gen_len"]) for run in report["runs"]] == [("prefill", 1), ("prefill", 4), ("decode", 4)]
    for run in report["runs"]:
        speed = run["tokens_per_s"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
    assert set(report["machine"]) == {"cpu", "cores", "memory_gb_per_s", "float32_gflops", "gpu"}
    assert report["weight_bytes"] == weight_bytes(folder) > 10_000


def test_the_report_says_what_became_of_drafts(folder, monkeypatch):
    monkeypatch.setattr("llmopt.bench.machine.PROBE_BYTES", 1 << 20)
    monkeypatch.setattr("llmopt.bench.machine.PROBE_SIZE", 64)
    drafting = SpeculativeConfig(method="ngram", prompt_lookup_max=1, num_speculative_tokens=3)
    options = {"backend": "reference", "speculative_config": drafting}
    report = bench_model(folder, grid([60], [1, 60], [2]), 2, seed=0, progress=silent, **options)
    prefill, also, decode = report["runs"]
    assert "speculation" not in prefill and "speculation" not in also
    drafted = decode["speculation"]
    assert drafted["draft_tokens"] >= drafted["accepted_tokens"] == sum(drafted["accepted_by_position"])
    assert drafted["draft_tokens"] >= drafted["drafts"] > 0
    assert len(drafted["accepted_by_position"]) == 3


def test_the_machine_has_a_name_and_limits():
    cpu = torch.device("cpu")
    assert cpu_name()
    assert read_bandwidth(cpu, size=1 << 20, seconds=0.0) > 1e6
    assert float32_flops(cpu, size=64, seconds=0.0) > 1e6
    assert describe_machine(cpu)["gpu"] is None
