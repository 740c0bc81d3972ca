"""What a request rules out, at each length of its output."""

from itertools import chain, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.engine.llm import LLM
from llmopt.engine.params import SamplingParams
from llmopt.engine.token_rules import NO_RULES, TokenRules
from llmopt.errors import InputError
from llmopt.model.tokenizer import load_tokenizer

TOKENS = st.integers(0, 3)
WORDS = st.lists(st.lists(TOKENS, min_size=1, max_size=4), max_size=6)


@given(WORDS, st.lists(TOKENS, min_size=1, max_size=5), st.lists(TOKENS, max_size=8))
def test_a_token_is_forbidden_where_it_would_complete_a_word(words: list, prompt: list[int], output: list[int]) -> None:
    expected = {word[-1] for word in words if [*output, word[-1]][-len(word) :] == word}
    assert TokenRules(bad_words=words).forbidden(prompt + output, len(prompt)) == expected


@given(WORDS, st.lists(TOKENS, max_size=20))
def test_no_word_comes_about_where_forbidden_tokens_are_kept_away(words: list, wishes: list[int]) -> None:
    rules, output = TokenRules(bad_words=words), []
    for wish in wishes:
        if wish not in rules.forbidden([9, *output], 1):
            output.append(wish)
    runs = [output[start:end] for end in range(len(output) + 1) for start in range(end)]
    assert not any(word in runs for word in words)


def test_ends_are_forbidden_until_there_are_enough_tokens() -> None:
    rules = TokenRules(ends=(1, 2), min_tokens=2, bad_words=[[7]])
    assert [rules.forbidden([1] * length, 1) for length in (1, 2, 3)] == [{1, 2, 7}, {1, 2, 7}, {7}]


def test_longer_bad_words_give_way_to_the_last_token_that_is_allowed() -> None:
    rules = TokenRules(allowed=(5, 6), ends=(6,), min_tokens=3, bad_words=[[5, 5]])
    assert rules.forbidden([1], 1) == {6}
    assert rules.forbidden([1, 5], 1) == {6}, "5 must come again: 6 would end the text too soon"
    assert rules.forbidden([1, 5, 5, 5], 1) == {5}


@pytest.mark.parametrize(
    "rules",
    [{"allowed": (5,), "bad_words": [[5]]}, {"allowed": (1, 5), "ends": (1,), "min_tokens": 1, "bad_words": [[5]]}],
)
def test_rules_that_leave_nothing_are_refused(rules: dict) -> None:
    with pytest.raises(InputError, match="nothing is left to choose"):
        TokenRules(**rules)


def test_a_request_that_asks_for_nothing_has_no_rules_of_its_own(tiny_model) -> None:
    tokenizer = load_tokenizer(str(tiny_model("llama")[0]))
    for params in (SamplingParams(), SamplingParams(stop_token_ids=(5,), logit_bias={})):
        assert TokenRules.of(params, tokenizer, frozenset({2}), 320) is NO_RULES


@pytest.mark.model
def test_words_are_spelled_at_the_beginning_and_after_a_space(smollm2) -> None:
    tokenizer = load_tokenizer(smollm2)
    cat, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in ("cat", " cat"))
    assert len(cat) == len(spaced) == 1 and cat != spaced
    rules = TokenRules.of(SamplingParams(bad_words=(" cat",)), tokenizer, frozenset(), tokenizer.vocab_size)
    assert rules.forbidden([1], 1) == {*cat, *spaced}
    new, york = tokenizer.encode(" New York", add_special_tokens=False)
    rules = TokenRules.of(SamplingParams(bad_words=("New York",)), tokenizer, frozenset(), tokenizer.vocab_size)
    assert rules.forbidden([1, new], 1) == {york}
    assert rules.forbidden([1, new], 2) == set(), "the prompt is not the output"


def test_tokens_that_the_model_does_not_have_are_no_matter(tiny_model) -> None:
    tokenizer = load_tokenizer(str(tiny_model("llama")[0]))
    (letter,) = tokenizer.encode("z", add_special_tokens=False)
    params = SamplingParams(bad_words=("z",), logit_bias={1: 1.0})
    assert TokenRules.of(params, tokenizer, frozenset(), letter).forbidden([1], 1) == set()


@pytest.fixture(scope="module", params=["reference", "cpu"])
def llm(request, tiny_model) -> LLM:
    if request.param == "cpu":
        pytest.importorskip("llmopt.kernels._cpu")
    return LLM(str(tiny_model("llama")[0]), backend=request.param, block_size=16)


def generated(llm: LLM, **params: Any) -> list[int]:
    wanted = SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **params})
    return llm.generate([[5, 6, 7]], wanted)[0].outputs[0].token_ids


def test_rules_reach_the_sampler_through_the_engine(llm: LLM) -> None:
    free = generated(llm)
    assert generated(llm, logit_bias={9: 100.0}) == [9] * 8
    assert generated(llm, allowed_token_ids=[9, 10], temperature=1, seed=3, max_tokens=50).count(9) not in (0, 50)
    assert set(generated(llm, allowed_token_ids=[9, 10])) <= {9, 10}
    assert free[0] not in generated(llm, logit_bias={free[0]: -100.0})


def test_bad_words_reach_the_sampler_through_the_engine(llm: LLM) -> None:
    letters = llm.engine.tokenizer.encode("qxz", add_special_tokens=False)
    assert len(letters) == 3
    free = generated(llm, allowed_token_ids=letters)
    word = llm.engine.tokenizer.decode(free[:2])
    pairs = list(pairwise(generated(llm, allowed_token_ids=letters, bad_words=[word])))
    assert tuple(free[:2]) not in pairs
    assert free[0] in chain(*pairs), "each of its tokens may come alone"


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"logit_bias": {320: 1.0}}, "logit_bias holds a token outside the vocabulary of 0 to 319"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids holds a token outside the vocabulary of 0 to 319"),
        ({"allowed_token_ids": [2], "min_tokens": 1}, "nothing is left to choose"),
    ],
)
def test_rules_that_cannot_be_met_are_refused(llm: LLM, params: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        generated(llm, **params)
    assert not llm.engine.has_work
