"""What is found in the cache changes when tokens come, never which: on small real models, on every backend."""

import pytest

from llmopt.engine.config import EngineConfig
from llmopt.engine.engine import Engine
from llmopt.engine.llm import LLM
from llmopt.engine.params import SamplingParams
from llmopt.errors import InputError

BLOCK_SIZE = 16
BACKENDS = {
    "reference": {"backend": "reference"},
    "cpu": {"backend": "cpu"},
    "cpu, rounding nothing": {"backend": "cpu", "dtype": "float32"},
}
SYSTEM = list(range(10, 60))  # three full blocks and two tokens
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
Work = dict[str, list[int]]
"""Prompts by the name of their request."""


@pytest.fixture(params=BACKENDS)
def options(request) -> dict:
    if request.param != "reference":
        pytest.importorskip("llmopt.kernels._cpu")
    return BACKENDS[request.param]


def make_engine(folder, **settings) -> Engine:
    defaults = {"max_num_seqs": 8, "block_size": BLOCK_SIZE, "max_model_len": 160}
    return Engine(EngineConfig(model=str(folder), **{**defaults, **settings}))


def prompts(count: int) -> Work:
    """Prompts that share a system prompt, with tails of different lengths; the last has been before."""
    tails = [[60 + number] * (1 + 5 * number) for number in range(count - 1)]
    return {f"r{number}": SYSTEM + tail for number, tail in enumerate([*tails, tails[3]])}


def generate(engine: Engine, work: Work, at_once: int = 100, params: SamplingParams = GREEDY) -> dict[str, list[int]]:
    """The tokens of each request; never more than `at_once` of them are open."""
    tokens: dict[str, list[int]] = {name: [] for name in work}
    left = list(work)
    while left or engine.has_work:
        while left and len(engine.scheduler.running) + len(engine.scheduler.waiting) < at_once:
            name = left.pop(0)
            engine.add(name, work[name], params)
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
        engine.check()
    stats = engine.stats()
    assert stats.used_blocks == 0
    return tokens


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3"])
def test_the_same_tokens_with_and_without_caching(family, options, tiny_model) -> None:
    folder, work = tiny_model(family)[0], prompts(8)
    plain = make_engine(folder, enable_prefix_caching=False, **options)
    expected = generate(plain, work)
    assert (plain.stats().prefix_cache_queries, plain.stats().cached_blocks) == (0, 0)
    for budget in (2048, 24):  # whole prompts in a step, and chunks of them
        caching = make_engine(folder, max_num_batched_tokens=budget, **options)
        assert generate(caching, work) == expected
        stats = caching.stats()
        assert stats.prefix_cache_queries == sum(map(len, work.values()))
        assert stats.prefix_cache_hits >= 7 * 48, "seven of eight find the system prompt"
        assert stats.preemptions == 0
        assert generate(caching, work, at_once=1) == expected, "and once more, when all is known"
        again = caching.stats().prefix_cache_hits - stats.prefix_cache_hits
        assert again == sum((len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for prompt in work.values())


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "fp8"])
def test_the_same_tokens_from_a_cache_of_any_kind(kind, tiny_model) -> None:
    """Over the compiled kernels, whose results are the same to the bit however tokens are cut into steps."""
    pytest.importorskip("llmopt.kernels._cpu")
    folder, work = tiny_model("llama")[0], prompts(8)
    options = {"backend": "cpu", "kv_cache_dtype": kind}
    expected = generate(make_engine(folder, enable_prefix_caching=False, **options), work)
    blocks = make_engine(folder, **options).runner.plan.block_bytes * 13
    for settings in ({}, {"max_num_batched_tokens": 24}, {"kv_cache_memory_bytes": blocks}):
        caching = make_engine(folder, **options, **settings)
        assert caching.runner.fused is not None
        assert generate(caching, work) == expected
        assert caching.stats().prefix_cache_hits > 0
        assert (caching.stats().preemptions > 0) == ("kv_cache_memory_bytes" in settings)


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_the_same_tokens_after_preemptions(family, options, tiny_model) -> None:
    folder, work = tiny_model(family)[0], prompts(8)
    expected = generate(make_engine(folder, enable_prefix_caching=False, **options), work)
    block_bytes = make_engine(folder, **options).runner.plan.block_bytes
    for caching in (True, False):
        small = make_engine(
            folder,
            kv_cache_memory_bytes=13 * block_bytes,
            max_num_batched_tokens=32,
            enable_prefix_caching=caching,
            **options,
        )
        assert small.stats().total_blocks == 13
        assert generate(small, work) == expected
        assert small.stats().preemptions > 0


def test_samples_of_one_prompt_are_those_of_as_many_requests(options, tiny_model) -> None:
    folder = str(tiny_model("llama")[0])
    params = SamplingParams(n=4, temperature=0.8, seed=5, max_tokens=12, ignore_eos=True)
    outputs = []
    for caching in (True, False):
        llm = LLM(folder, max_num_seqs=8, enable_prefix_caching=caching, **options)
        result = llm.generate([SYSTEM], params)[0]
        outputs.append([choice.token_ids for choice in result.outputs])
        assert result.num_cached_tokens == 0, "the first computed it"
        assert llm.engine.stats().prefix_cache_hits == (3 * 48 if caching else 0)
    assert outputs[0] == outputs[1]
    assert len({tuple(tokens) for tokens in outputs[0]}) == 4


def test_a_conversation_finds_its_own_answers(options, tiny_model) -> None:
    llm = LLM(str(tiny_model("llama")[0]), max_num_seqs=4, **options)
    plain = LLM(str(tiny_model("llama")[0]), max_num_seqs=4, enable_prefix_caching=False, **options)
    history = list(SYSTEM)
    for turn in range(3):
        result = llm.generate([history], GREEDY)[0]
        known = len(history) - 5 if turn else 0  # what the last turn left, less its last token, which nobody computed
        assert result.num_cached_tokens == max(0, known - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert result.outputs[0].token_ids == plain.generate([history], GREEDY)[0].outputs[0].token_ids
        history += [*result.outputs[0].token_ids, *range(70, 75)]


def test_what_is_to_be_reported_of_a_prompt_is_computed_and_then_found_by_others(options, tiny_model) -> None:
    llm = LLM(str(tiny_model("llama")[0]), max_num_seqs=4, **options)
    params = SamplingParams(n=2, temperature=0, max_tokens=4, prompt_logprobs=0, ignore_eos=True)
    first, again = (llm.generate([SYSTEM], params)[0] for _ in range(2))
    assert first.num_cached_tokens == again.num_cached_tokens == 0
    assert len(first.prompt_logprobs) == len(SYSTEM)
    assert first.prompt_logprobs == again.prompt_logprobs
    stats = llm.engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (2 * len(SYSTEM), 2 * 48), "the second samples'"


def test_only_the_same_salt_finds(tiny_model) -> None:
    llm = LLM(str(tiny_model("llama")[0]), max_num_seqs=4)
    found = [
        llm.generate([SYSTEM], GREEDY, cache_salt=salt)[0].num_cached_tokens for salt in (None, "a", "b", "a", None)
    ]
    assert found == [0, 0, 0, 48, 48]


def test_an_interrupted_step_leaves_nothing_to_find(tiny_model, monkeypatch) -> None:
    """As when somebody presses Ctrl-C in a notebook: what was not computed must not be taken for computed."""
    llm = LLM(str(tiny_model("llama")[0]), max_num_seqs=4)
    expected = LLM(str(tiny_model("llama")[0])).generate([SYSTEM], GREEDY)[0].outputs[0].token_ids

    def interrupt(batch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([SYSTEM], GREEDY)
    assert not llm.engine.has_work
    result = llm.generate([SYSTEM], GREEDY)[0]
    assert (result.num_cached_tokens, result.outputs[0].token_ids) == (0, expected)


def test_priorities_count_only_where_asked_for(tiny_model) -> None:
    folder = str(tiny_model("llama")[0])
    llm = LLM(folder, max_num_seqs=4)
    with pytest.raises(InputError, match="--scheduling-policy priority"):
        llm.generate([SYSTEM], GREEDY, priority=[1])
    with pytest.raises(InputError, match="must not be empty"):
        llm.generate([SYSTEM], GREEDY, cache_salt="")
    with pytest.raises(InputError, match="1 prompts and 2 priorities"):
        llm.generate([SYSTEM], GREEDY, priority=[1, 2])
    assert not llm.engine.has_work
    engine = make_engine(folder, max_num_seqs=1, scheduling_policy="priority")
    for name, priority in (("last", 3), ("middle", 0), ("first", -3)):
        engine.add(name, SYSTEM, GREEDY, priority)
    ended = []
    while engine.has_work:
        ended += [delta.request_id for delta in engine.step() if delta.finish_reason]
    assert ended == ["first", "middle", "last"]
