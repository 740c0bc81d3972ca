"""What sampling parameters may be, and what they say where they may not."""

import pytest

from llmopt.engine.params import SamplingParams
from llmopt.errors import InputError


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": -1.0}, "temperature must be between 0 and 2, not -1.0"),
        ({"temperature": 2.1}, "temperature must be between 0 and 2, not 2.1"),
        ({"temperature": float("nan")}, "temperature must be between 0 and 2, not nan"),
        ({"temperature": None}, "temperature must be a number, not None"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"top_p": 0.0}, "top_p must be above 0; for greedy decoding give temperature 0"),
        ({"top_p": 1.5}, "top_p must be between 0 and 1, not 1.5"),
        ({"top_k": -2}, "top_k must be between 0 and"),
        ({"top_k": 1.5}, "top_k must be a whole number, not 1.5"),
        ({"min_p": 2.0}, "min_p must be between 0 and 1, not 2.0"),
        ({"max_tokens": 0}, "max_tokens must be between 1 and"),
        ({"n": 0}, "n must be between 1 and 128, not 0"),
        ({"n": None}, "n must be a whole number, not None"),
        ({"seed": 2**64}, "seed must be between"),
        ({"presence_penalty": 3.0}, "presence_penalty must be between -2 and 2, not 3.0"),
        ({"frequency_penalty": -3.0}, "frequency_penalty must be between -2 and 2, not -3.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0; 1 means none"),
        ({"logprobs": 99}, "logprobs must be between 0 and 20, not 99"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be between 0 and 20, not -1"),
        ({"stop": ("",)}, "a stop string must not be empty"),
        ({"stop": (3,)}, "stop must hold strings, not 3"),
        ({"stop": "\ud800"}, "stop holds half of a surrogate pair, which is no character"),
        ({"stop_token_ids": (1.5,)}, "stop_token_ids must hold token ids, not 1.5"),
        ({"min_tokens": 5, "max_tokens": 2}, r"min_tokens \(5\) must not exceed max_tokens \(2\)"),
        ({"allowed_token_ids": ()}, "allowed_token_ids must hold at least one token; leave it out to allow all"),
        ({"allowed_token_ids": ("a",)}, "allowed_token_ids must hold token ids, not 'a'"),
        ({"logit_bias": {5: 101}}, r"logit_bias must be between -100 and 100, not 101 \(token 5\)"),
        ({"logit_bias": {5: float("nan")}}, r"logit_bias must be between -100 and 100, not nan \(token 5\)"),
        ({"logit_bias": {5: None}}, r"logit_bias must be between -100 and 100, not None \(token 5\)"),
        ({"logit_bias": {"five": 1}}, "the keys of logit_bias must be token ids, such as \"50\", not 'five'"),
        ({"logit_bias": {"9" * 5000: 1}}, "the keys of logit_bias must be token ids"),
        ({"bad_words": ("  ",)}, "a bad word must hold more than spaces"),
        ({"bad_words": ("\udfff",)}, "bad_words holds half of a surrogate pair, which is no character"),
    ],
)
def test_values_out_of_range_are_refused_with_the_range(wrong: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        SamplingParams(**wrong)


def test_what_may_be_written_in_several_ways_comes_to_the_same() -> None:
    plain = SamplingParams(stop=("a",), bad_words=("b",), logit_bias={5: 1.0}, allowed_token_ids=(1, 2))
    assert SamplingParams(stop="a", bad_words="b", logit_bias={"5": 1}, allowed_token_ids=[1, 2]) == plain
    assert SamplingParams(top_k=-1, seed=-1, stop=None, bad_words=None, stop_token_ids=None) == SamplingParams()


def test_tokens_are_named_by_the_parameters_that_name_some() -> None:
    params = SamplingParams(stop_token_ids=(3,), logit_bias={5: 1.0, 6: 2.0}, allowed_token_ids=(1, 2))
    named = {name: sorted(tokens) for name, tokens in params.named_tokens.items()}
    assert named == {"stop_token_ids": [3], "logit_bias": [5, 6], "allowed_token_ids": [1, 2]}
    assert SamplingParams().named_tokens == {}


@pytest.mark.parametrize(("seed", "seeds"), [(7, [7, 8, 9]), (None, [None] * 3), (-2, [-2, -3, -4]), (0, [0, 1, 2])])
def test_every_choice_has_a_seed_of_its_own(seed: int | None, seeds: list) -> None:
    params = SamplingParams(n=3, seed=seed, top_k=5)
    choices = [params.of_choice(index) for index in range(3)]
    assert [choice.seed for choice in choices] == seeds
    assert {(choice.n, choice.top_k) for choice in choices} == {(1, 5)}
