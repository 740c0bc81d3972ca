"""With drafts, whoever makes them, every request gets the tokens that it gets without: on small real models."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmopt.engine.config import EngineConfig
from llmopt.engine.engine import Engine
from llmopt.engine.llm import LLM
from llmopt.engine.params import SamplingParams
from llmopt.engine.request import Request
from llmopt.engine.scheduler import Chunk
from llmopt.engine.speculation.config import SpeculativeConfig
from llmopt.engine.speculation.draft_length import Candidate
from llmopt.engine.speculation.drafter import GoesOn
from llmopt.engine.speculation.speculator import Speculator

VOCABULARY = 320
NGRAM = SpeculativeConfig(method="ngram", prompt_lookup_min=1, prompt_lookup_max=3)
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


class Oracle:
    """Drafts what is going to come, as far as it has been told, but for some tokens that it gets wrong; it may stop
    before there are as many as were asked for."""

    by_confidence = True

    def __init__(self, texts: Sequence[list[int]], right: float, stops: bool = False) -> None:
        self.texts, self.right, self.stops = texts, right, stops
        self.random = random.Random(2)

    def lag(self, request: Request) -> int | None:
        return None if self.random.random() < 0.1 else 0

    def draft(self, chunks: Sequence[Chunk], goes_on: GoesOn) -> None:
        for chunk in chunks:
            known = chunk.request.tokens
            text = next((text for text in self.texts if text[: len(known)] == known), known)
            follows = text[len(known) : len(known) + chunk.drafted]
            follows += [5] * (chunk.drafted - len(follows))
            count = self.random.randint(1, chunk.drafted) if self.stops else chunk.drafted
            chunk.request.drafts = [
                token if self.random.random() < self.right else self.random.randrange(VOCABULARY)
                for token in follows[:count]
            ]

    def likelihoods(self, request: Request) -> list[float]:
        return [self.random.random() for _ in request.drafts]

    def seconds(self, rows: int) -> float:
        return 0.0


def let_draft(engine: Engine, drafter, most: int = 5) -> None:
    """Have an engine draft numbers of tokens at random, whether it pays or not."""
    engine.speculator = Speculator(drafter, most)
    numbers = random.Random(3)

    def choose(candidates: Sequence[Candidate], decoding: int) -> list[int]:
        return [numbers.randint(0, one.most) for one in candidates]

    engine.speculator.length.choose = choose


def make_engine(folder, **options) -> Engine:
    defaults = {"backend": "cpu", "max_num_seqs": 6, "block_size": 16, "max_model_len": 128}
    return Engine(EngineConfig(model=str(folder), **{**defaults, **options}))


def generate(engine: Engine, work: list[tuple[list[int], SamplingParams]]) -> list[list]:
    """For each request all that was said of it, its deltas joined."""
    said = [[[], "", [], None, None, 0] for _ in work]
    for number, (prompt, params) in enumerate(work):
        engine.add(str(number), prompt, params)
    while engine.has_work:
        for delta in engine.step():
            one = said[int(delta.request_id)]
            assert one[3] is None and delta.token_ids
            one[0] += delta.token_ids
            one[1] += delta.text
            one[2] += delta.logprobs or []
            one[3:5] = delta.finish_reason, delta.stop_reason
            assert delta.output_tokens == len(one[0])
            assert delta.logprobs is None or len(delta.logprobs) == len(delta.token_ids)
            one[5] += len(delta.prompt_logprobs or ())
        engine.check()
    assert engine.stats().used_blocks == 0
    assert engine.stats().generation_tokens >= sum(len(one[0]) for one in said)
    return said


def some_work(seed: int, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Requests with shared prefixes and all kinds of wishes."""
    choices = random.Random(seed)
    wishes: list[dict] = [
        {"temperature": 0},
        {"temperature": 0, "ignore_eos": False},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"temperature": 0, "presence_penalty": 1.5, "logit_bias": {7: 3.0}},
        {"temperature": 0, "min_tokens": 9, "stop_token_ids": tuple(range(100, 180))},
        {"temperature": 0, "allowed_token_ids": (5, 6, 7, 8)},
        {"temperature": 0, "bad_words": ("the", "the cat")},
        {"temperature": 0, "stop": ("a", "e")},
        {"temperature": 0, "prompt_logprobs": 1},
        {"temperature": 0.9, "seed": 4},
        {"temperature": 0.7, "top_k": 9, "seed": 5},
        {"temperature": 1.0, "top_p": 0.8, "min_p": 0.02, "seed": 6, "repetition_penalty": 1.1},
        {"temperature": 0.5, "seed": 7, "logprobs": 0, "frequency_penalty": 0.5},
    ]
    work = []
    for _ in range(count):
        prompt = list(range(10, 10 + choices.choice((5, 35)))) + choices.choices(range(60, 64), k=choices.randint(1, 9))
        wish = {"ignore_eos": True, "max_tokens": choices.randint(1, 30), **choices.choice(wishes)}
        wish["max_tokens"] = max(wish["max_tokens"], wish.get("min_tokens", 0))
        work.append((prompt, SamplingParams(**wish)))
    return work


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6),
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    budget=st.sampled_from([8, 24, 512]),
    blocks=st.sampled_from([9, 14, None]),
    caching=st.booleans(),
    stops=st.booleans(),
)
def test_everything_is_the_same_with_drafts(seed, right, budget, blocks, caching, stops, tiny_model) -> None:
    """In few blocks (so that some are preempted) and many, in chunks and at once, whoever is right how often."""
    pytest.importorskip("llmopt.kernels._cpu")
    folder, work = tiny_model("llama")[0], some_work(seed, 7)
    expected = generate(make_engine(folder), work)
    options = {"max_num_batched_tokens": budget, "enable_prefix_caching": caching}
    if blocks is not None:
        options["kv_cache_memory_bytes"] = blocks * make_engine(folder).runner.plan.block_bytes
    engine = make_engine(folder, **options)
    texts = [prompt + said[0] for (prompt, _), said in zip(work, expected, strict=True)]
    let_draft(engine, Oracle(texts, right, stops))
    assert generate(engine, work) == expected
    stats = engine.stats().speculation
    assert stats is not None
    assert stats.accepted_tokens == sum(stats.accepted_by_position) <= stats.draft_tokens
    assert stats.accepted_by_position == sorted(stats.accepted_by_position, reverse=True)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3"])
@pytest.mark.parametrize("options", [{"backend": "reference"}, {}, {"dtype": "float32"}, {"kv_cache_dtype": "int8"}])
def test_ngrams_change_nothing_on_any_backend(family, options, tiny_model) -> None:
    if options.get("backend") != "reference":
        pytest.importorskip("llmopt.kernels._cpu")
    folder = tiny_model(family)[0]
    work = [([10, 11, 12] * 5 + [20 + number], GREEDY) for number in range(5)]
    expected = generate(make_engine(folder, **options), work)
    engine = make_engine(folder, speculative_config=NGRAM, **options)
    assert generate(engine, work) == expected
    assert engine.stats().speculation.draft_tokens > 0


def test_a_step_gives_what_was_accepted_and_no_more_than_was_asked_for(tiny_model) -> None:
    folder = tiny_model("llama")[0]
    plain = make_engine(folder)
    ((tokens, *_),) = generate(plain, [([5, 6, 7], GREEDY)])
    engine = make_engine(folder)
    let_draft(engine, Oracle([[5, 6, 7, *tokens]], 1.0), most=8)
    assert generate(engine, [([5, 6, 7], GREEDY)])[0][0] == tokens
    assert engine.stats().steps < plain.stats().steps
    engine.speculator.drafter.lag = lambda request: 0
    engine.speculator.length.choose = lambda candidates, decoding: [one.most for one in candidates]
    sizes = []
    engine.add("r", [5, 6, 7], GREEDY)
    while engine.has_work:
        sizes += [len(delta.token_ids) for delta in engine.step()]
    assert sizes == [1, 9, 9, 5]


def test_a_text_ends_inside_a_draft(tiny_model) -> None:
    folder = tiny_model("llama")[0]
    ((tokens, *_),) = generate(make_engine(folder), [([5, 6, 7], GREEDY)])
    stop = tokens[6]
    first = tokens.index(stop)
    for params, reason in (
        (SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=(stop,)), ("stop", stop)),
        (SamplingParams(temperature=0, max_tokens=first + 1, ignore_eos=True), ("length", None)),
    ):
        engine = make_engine(folder)
        let_draft(engine, Oracle([[5, 6, 7, *tokens]], 1.0), most=16)
        engine.speculator.length.choose = lambda candidates, decoding: [one.most for one in candidates]
        engine.speculator.drafter.lag = lambda request: 0
        ((got, _, _, *why, _),) = generate(engine, [([5, 6, 7], params)])
        assert got == tokens[: first + 1]
        assert tuple(why) == reason


def test_what_cannot_be_predicted_is_hardly_drafted_for(tiny_model) -> None:
    """A draft that is always wrong: after its first trials there are only probes."""
    engine = make_engine(tiny_model("llama")[0], max_model_len=256, speculative_config=NGRAM)
    engine.speculator.drafter = Oracle([], 0.0)
    params = SamplingParams(temperature=0, max_tokens=240, ignore_eos=True)
    generate(engine, [([5, 6, 7], params)])
    half = engine.stats().speculation.draft_tokens
    generate(engine, [([8, 9], params)])
    stats = engine.stats().speculation
    assert 0 < half < 240, "of 1,900 that it might be"
    assert stats.draft_tokens - half < 160
    assert stats.accepted_tokens < 10


def test_llm_takes_a_dict(tiny_model) -> None:
    folder = str(tiny_model("llama")[0])
    llm = LLM(folder, speculative_config={"method": "ngram", "prompt_lookup_max": 1})
    prompt = [10, 11, 12] * 6
    outputs = llm.generate([prompt], GREEDY)[0].outputs[0]
    assert outputs.token_ids == LLM(folder).generate([prompt], GREEDY)[0].outputs[0].token_ids
    assert LLM(folder).engine.stats().speculation is None
