"""A draft model changes nothing but when tokens come, and what its cache holds is right."""

import pytest

from llmopt.engine.config import EngineConfig
from llmopt.engine.engine import Engine
from llmopt.engine.params import SamplingParams
from llmopt.engine.speculation.config import SpeculativeConfig

SYSTEM = list(range(10, 60))  # three full blocks and two tokens
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=24, ignore_eos=True)
PENALISED = SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=24, ignore_eos=True)
WORK = [(SYSTEM + [60 + number] * (1 + 5 * number), (GREEDY, DRAWN, PENALISED)[number % 3]) for number in range(7)]


def make_engine(folder, draft=None, **options) -> Engine:
    """With a draft, as many tokens are drafted as may be, whether it pays or not."""
    pytest.importorskip("llmopt.kernels._cpu")
    drafting = None if draft is None else SpeculativeConfig(model=str(draft), num_speculative_tokens=3)
    defaults = {"backend": "cpu", "max_num_seqs": 8, "block_size": 16, "max_model_len": 160}
    engine = Engine(EngineConfig(model=str(folder), speculative_config=drafting, **{**defaults, **options}))
    if draft is not None:
        engine.speculator.length.choose = lambda candidates, decoding: [one.most for one in candidates]
        engine.speculator.length.goes_on = lambda request, likelihoods, together: True
    return engine


def generate(engine: Engine, work=WORK) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in work]
    for number, (prompt, params) in enumerate(work):
        engine.add(str(number), prompt, params)
    while engine.has_work:
        for delta in engine.step():
            tokens[int(delta.request_id)] += delta.token_ids
        engine.check()
    assert engine.stats().used_blocks == 0
    return tokens


@pytest.fixture
def target(tiny_model):
    return tiny_model("llama")[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 24},
        {"enable_prefix_caching": False},
        {"kv_cache_dtype": "int8"},
        {"dtype": "float32"},
    ],
)
def test_a_model_that_drafts_for_itself_is_always_right(options, target) -> None:
    """So its cache holds the right keys and values, in shared blocks, in those that are found, in those that were given
    back: one that were wrong would be a draft that is rejected."""
    expected = generate(make_engine(target, **options))
    engine = make_engine(target, target, **options)
    for _ in range(2):  # once more, when all is in the cache
        assert generate(engine) == expected
        stats = engine.stats().speculation
        assert stats.accepted_tokens == stats.draft_tokens > 0
    if engine.config.enable_prefix_caching:
        assert engine.stats().prefix_cache_hits > 7 * 48


def test_it_is_still_right_after_preemptions(target) -> None:
    expected = generate(make_engine(target))
    blocks = make_engine(target, target).runner.plan.block_bytes * 13
    for caching in (True, False):
        engine = make_engine(target, target, kv_cache_memory_bytes=blocks, enable_prefix_caching=caching)
        assert engine.stats().total_blocks == 13
        assert generate(engine) == expected
        stats = engine.stats()
        assert stats.preemptions > 0
        assert stats.speculation.accepted_tokens == stats.speculation.draft_tokens > 0


def test_what_the_draft_has_computed_of_a_prefix_is_found(target) -> None:
    engine = make_engine(target, target)
    generate(engine, WORK[:1])
    computed: list[int] = []
    run, hidden = engine.speculator.drafter.runner.run, engine.speculator.drafter.runner.hidden
    engine.speculator.drafter.runner.run = lambda batch: computed.append(len(batch.host.tokens)) or run(batch)
    engine.speculator.drafter.runner.hidden = lambda batch: computed.append(len(batch.host.tokens)) or hidden(batch)
    generate(engine, [([*SYSTEM, 99], GREEDY)])
    assert computed[0] == len(SYSTEM) + 2 - 48


def test_another_model_as_the_draft(target, tiny_model) -> None:
    draft = tiny_model("qwen3")[0]
    expected = generate(make_engine(target))
    for options in ({}, {"max_num_batched_tokens": 16}, {"backend": "reference"}):
        engine = make_engine(target, draft, **options)
        if "backend" in options:
            expected = generate(make_engine(target, **options))
        assert generate(engine) == expected
        stats = engine.stats().speculation
        assert stats.draft_tokens > stats.accepted_tokens


def test_the_cache_is_shared_out(target, tiny_model) -> None:
    alone, both = make_engine(target), make_engine(target, tiny_model("qwen3")[0])
    assert both.runner.plan.block_bytes > alone.runner.plan.block_bytes
    assert both.speculator.drafter.runner.plan.blocks == both.runner.plan.blocks
    size = 40 * both.runner.plan.block_bytes
    assert make_engine(target, tiny_model("qwen3")[0], kv_cache_memory_bytes=size).stats().total_blocks == 40
