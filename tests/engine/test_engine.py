"""The engine over a small model: what it refuses, what it reports, what it leaves behind."""

import pytest

from llmopt.engine.config import EngineConfig
from llmopt.engine.engine import Engine
from llmopt.engine.llm import LLM
from llmopt.engine.params import SamplingParams
from llmopt.engine.prefill_pace import PrefillPace, pace_of
from llmopt.errors import InputError

LONGEST = 256


@pytest.fixture(scope="module")
def llm(tiny_model) -> LLM:
    return LLM(str(tiny_model("qwen3")[0]), max_num_seqs=4, block_size=4)


@pytest.fixture(params=["reference", "cpu"])
def engine(request, tiny_model) -> Engine:
    if request.param == "cpu":
        pytest.importorskip("llmopt.kernels._cpu")
    return Engine(EngineConfig(model=str(tiny_model("llama")[0]), backend=request.param, max_num_seqs=4, block_size=4))


def run(engine: Engine) -> list:
    deltas = []
    while engine.has_work:
        deltas += engine.step()
        engine.check()
    return deltas


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ([], {}, "empty"),
        ([5] * LONGEST, {}, "256 tokens; prompt and output together may have 256"),
        ([5, 320], {}, "0 to 319"),
        ([-1], {}, "0 to 319"),
        ([5], {"n": 2}, "one completion"),
        ([5], {"stop_token_ids": (320,)}, "stop_token_ids"),
    ],
)
def test_what_can_never_be_served_is_refused(prompt: list[int], params: dict, says: str, engine: Engine) -> None:
    with pytest.raises(InputError, match=says):
        engine.add("r", prompt, SamplingParams(**params))
    assert not engine.has_work


def test_an_id_in_use_is_refused(engine: Engine) -> None:
    engine.add("r", [5], SamplingParams())
    with pytest.raises(InputError, match="already"):
        engine.add("r", [5], SamplingParams())
    engine.abort("r")
    engine.abort("r")
    engine.abort("never seen")
    assert not engine.has_work


def test_aborted_requests_leave_nothing_and_say_nothing(engine: Engine) -> None:
    for name in "abcdef":  # two more than may run at once
        engine.add(name, [ord(name)] * 9, SamplingParams(max_tokens=20, ignore_eos=True))
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (4, 2)
    for name in "bef":
        engine.abort(name)
    seen = {delta.request_id for delta in run(engine)}
    assert seen == {"a", "c", "d"}
    assert engine.stats().used_blocks == 0
    assert engine.stats().generation_tokens >= 60


def test_a_text_ends_at_the_longest_length(engine: Engine) -> None:
    engine.add("r", [5] * 250, SamplingParams(max_tokens=None, ignore_eos=True))
    last = run(engine)[-1]
    assert last.finish_reason == "length"
    assert last.prompt_tokens + last.output_tokens == LONGEST


def test_stop_tokens_end_a_text_and_are_not_in_it(llm: LLM) -> None:
    free = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].outputs[0]
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=(stop,))
    output = llm.generate([[5, 6, 7]], params)[0].outputs[0]
    assert output.token_ids == free.token_ids[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert free.text.startswith(output.text)


def test_results_come_in_the_order_of_prompts_with_all_choices(llm: LLM) -> None:
    prompts: list = [[5] * n for n in (30, 2, 11, 4, 19)]
    outputs = llm.generate(prompts, SamplingParams(n=3, max_tokens=5, seed=1, ignore_eos=True))
    assert [len(output.prompt_token_ids) for output in outputs] == [30, 2, 11, 4, 19]
    assert all([choice.index for choice in output.outputs] == [0, 1, 2] for output in outputs)
    assert all(len(choice.token_ids) == 5 for output in outputs for choice in output.outputs)
    llm.engine.check()
    assert llm.engine.stats().used_blocks == 0


def test_logprobs_come_with_each_token(llm: LLM) -> None:
    output = llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=4, logprobs=2, ignore_eos=True))[0]
    choice = output.outputs[0]
    assert choice.logprobs is not None and len(choice.logprobs) == len(choice.token_ids)
    for token, report in zip(choice.token_ids, choice.logprobs, strict=True):
        assert report.token_id == token == report.top[0][0] and report.rank == 1


def test_a_bad_prompt_among_good_ones_stops_nothing_half_way(llm: LLM) -> None:
    with pytest.raises(InputError, match="empty"):
        llm.generate([[5], []])
    assert not llm.engine.has_work


def test_params_that_fail_half_way_leave_nothing(llm: LLM) -> None:
    with pytest.raises(InputError, match="stop_token_ids"):
        llm.generate([[5], [6]], [SamplingParams(), SamplingParams(stop_token_ids=(10**6,))])
    assert not llm.engine.has_work
    with pytest.raises(InputError, match="2 prompts and 1 params"):
        llm.generate([[5], [6]], [SamplingParams()])
    assert len(llm.generate([[5], [6]], SamplingParams(max_tokens=2))) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_model_len": 1000}, "256 tokens the model was made for"),
        ({"max_num_seqs": 0}, "at least 1"),
        ({"max_num_batched_tokens": 2, "max_num_seqs": 3}, "at least max_num_seqs"),
        ({"kv_cache_memory_bytes": 1}, "give at least"),
        ({"kv_cache_memory_bytes": 40_000, "max_model_len": 256}, "does not fit into the KV cache"),
        ({"kv_cache_memory_bytes": 2**60}, "more than this machine's memory"),
        ({"device": "tpu"}, "tpu"),
        ({"batching": "lazy"}, "continuous, dynamic, static"),
        ({"batching_window": 5.0}, "needs --batching dynamic"),
        ({"batching": "static", "batching_window": 5.0}, "needs --batching dynamic"),
        ({"batching": "dynamic", "batching_window": -1.0}, "at least 0 ms"),
        ({"batching": "dynamic", "batching_window": float("nan")}, "at least 0 ms"),
        ({"chunked_prefill_size": -1}, "0 for no limit"),
        ({"dtype": "int3"}, "int3"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options: dict, says: str, tiny_model) -> None:
    with pytest.raises(InputError, match=says):
        LLM(str(tiny_model("llama")[0]), **options)


def test_a_small_cache_shortens_what_is_taken(tiny_model, caplog) -> None:
    small = LLM(str(tiny_model("llama")[0]), kv_cache_memory_bytes=60_000, block_size=4)
    assert small.engine.max_model_len < LONGEST
    assert "limited to" in caplog.text
    with pytest.raises(InputError, match="may have"):
        small.generate([[5] * small.engine.max_model_len])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_policy_and_no_chunk_changes_what_is_said(backend: str, tiny_model) -> None:
    if backend == "cpu":
        pytest.importorskip("llmopt.kernels._cpu")
    options = {"backend": backend, "dtype": "float32", "max_num_seqs": 3, "block_size": 16}
    prompts: list = [list(range(3, 3 + length)) for length in (40, 2, 11, 90, 19)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 3, 12, 5, 7)]

    def said(**more) -> list:
        llm = LLM(str(tiny_model("llama")[0]), **options, **more)
        results = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        llm.engine.check()
        assert llm.engine.stats().used_blocks == 0
        return results

    alone = said()
    assert said(chunked_prefill_size=4) == alone
    assert said(batching="static") == alone
    assert said(batching="dynamic", batching_window=20.0, chunked_prefill_size=16) == alone


def test_an_engine_says_how_long_it_gathers_and_that_it_no_longer_does(tiny_model) -> None:
    config = EngineConfig(
        model=str(tiny_model("llama")[0]), backend="reference", max_num_seqs=2, batching="dynamic", batching_window=6e4
    )
    engine = Engine(config)
    assert engine.pause == 0
    engine.add("a", [5], SamplingParams(max_tokens=3, ignore_eos=True))
    assert engine.has_work and 59 < engine.pause <= 60
    assert engine.step() == []
    engine.add("b", [5], SamplingParams(max_tokens=3, ignore_eos=True))
    assert engine.pause == 0
    assert len(engine.step()) == 2


def test_chunks_are_limited_on_a_cpu_unless_told_otherwise_and_not_for_llm(tiny_model) -> None:
    folder = str(tiny_model("llama")[0])
    engine = Engine(EngineConfig(model=folder, backend="reference"))
    assert engine.scheduler.pace == pace_of(None, "cpu", engine.model_config)
    assert LLM(folder, backend="reference").engine.scheduler.pace is None
    assert LLM(folder, backend="reference", chunked_prefill_size=7).engine.scheduler.pace == PrefillPace(7)


def test_the_phases_of_a_step_come_in_their_order(engine: Engine) -> None:
    phases: list[str] = []
    engine.watch = phases.append
    engine.step()
    assert phases == []
    engine.add("r", [5, 6], SamplingParams(max_tokens=2, ignore_eos=True))
    engine.step()
    assert phases == ["schedule", "build batch", "compute", "sample", "detokenize", "schedule"]
