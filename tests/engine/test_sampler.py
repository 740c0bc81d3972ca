"""Each sampling parameter does what its definition says, and a request's choice is its own."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.backend.reference import ReferenceBackend
from llmopt.engine.params import SamplingParams
from llmopt.engine.request import Request
from llmopt.engine.row import Row
from llmopt.engine.sampler import Sampler, uniform
from llmopt.engine.token_rules import TokenRules

EOS = 0
VOCABULARY = 24
NO_TOKENIZER: Any = None  # no test here has bad words


def make_request(seed: int = 0, tokens: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **params) -> Request:
    wanted = SamplingParams(**params)
    rules = TokenRules.of(wanted, NO_TOKENIZER, frozenset({EOS}), VOCABULARY)
    request = Request("r", list(tokens), wanted, seed, rules)
    request.tokens += output
    return request


def sample(logits: torch.Tensor, *requests: Request):
    return Sampler(ReferenceBackend())(logits.clone(), [Row(request) for request in requests])


def frequencies(logits: torch.Tensor, draws: int = 3000, **params) -> dict[int, float]:
    requests = [make_request(seed=i, **params) for i in range(draws)]
    counts = Counter(sample(logits.expand(draws, -1), *requests).token_ids)
    return {token: count / draws for token, count in counts.items()}


def test_greedy_takes_the_largest() -> None:
    logits = torch.randn(5, VOCABULARY)
    assert sample(logits, *[make_request(temperature=0)] * 5).token_ids == logits.argmax(-1).tolist()


def test_temperature_one_draws_from_the_softmax() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    found = frequencies(logits)
    chi_square = sum(3000 * (found.get(i, 0) - p) ** 2 / p for i, p in enumerate((0.5, 0.3, 0.15, 0.05)))
    assert chi_square < 16.3  # 0.1% for three degrees of freedom; the draws are seeded, so this never flickers


def test_temperature_sharpens() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.4]]))
    expected = 0.6**2 / (0.6**2 + 0.4**2)
    assert frequencies(logits, temperature=0.5)[0] == pytest.approx(expected, abs=0.03)


def test_top_k_top_p_and_min_p_keep_what_they_say() -> None:
    logits = torch.log(torch.tensor([[0.05, 0.4, 0.3, 0.15, 0.1]]))
    assert set(frequencies(logits, top_k=2)) == {1, 2}
    assert set(frequencies(logits, top_p=0.7)) == {1, 2}
    assert set(frequencies(logits, top_p=0.71)) == {1, 2, 3}
    assert set(frequencies(logits, top_p=0.01)) == {1}
    assert set(frequencies(logits, min_p=0.3)) == {1, 2, 3}
    assert frequencies(logits, top_k=2)[1] == pytest.approx(4 / 7, abs=0.03)
    assert set(frequencies(logits, top_k=3, top_p=0.5)) == {1, 2}, "top-p counts what top-k has left"


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**63 - 1), st.integers(1, 6), st.data())
def test_a_choice_depends_on_its_own_row_alone(seed: int, neighbours: int, data) -> None:
    generator = torch.Generator().manual_seed(seed % 1000)
    logits = torch.randn(neighbours + 1, VOCABULARY, generator=generator)
    kinds = st.sampled_from(
        [
            {},
            {"temperature": 0},
            {"top_k": 3},
            {"top_p": 0.5},
            {"repetition_penalty": 1.5},
            {"logit_bias": {3: 2.0, 5: -100.0}},
            {"allowed_token_ids": (0, 4, 9), "min_tokens": 1},
            {"min_tokens": 2, "stop_token_ids": (7,)},
        ]
    )
    requests = [make_request(seed=seed + i, **data.draw(kinds)) for i in range(neighbours + 1)]
    together = sample(logits, *requests).token_ids
    alone = [sample(logits[i : i + 1], request).token_ids[0] for i, request in enumerate(requests)]
    assert together == alone


def test_random_numbers_are_even_and_repeatable() -> None:
    draws = [uniform(seed, position) for seed in range(50) for position in range(100)]
    assert all(0 <= draw < 1 for draw in draws)
    assert len(set(draws)) == len(draws)
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.02)
    assert uniform(3, 7) == uniform(3, 7)


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits = torch.tensor([[0.0, 3.0, -1.0, 2.0, 2.5]])
    request = make_request(tokens=(1, 2), output=(4,), temperature=0, repetition_penalty=2.0)
    assert sample(logits, request).token_ids == [3]  # 1 falls to 1.5, 4 to 1.25, 2 to -2


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9, 2.0]])
    once = make_request(tokens=(1,), output=(2, 2), temperature=0, presence_penalty=0.5)
    assert sample(logits, once).token_ids == [1]
    often = make_request(tokens=(3,), output=(1, 1, 2), temperature=0, frequency_penalty=0.6)
    assert sample(logits, often).token_ids == [2]  # 1 falls by 1.2, 2 by 0.6


def test_a_penalty_is_one_requests_own() -> None:
    logits = torch.tensor([[0.0, 3.0, -1.0, 2.0, 2.5]]).repeat(3, 1)
    plain, penalised = make_request(temperature=0), make_request(tokens=(1, 4), temperature=0, repetition_penalty=2.0)
    assert sample(logits, plain, penalised, plain).token_ids == [1, 3, 1]
    penalised.tokens += [3, 3]
    assert sample(logits, penalised, plain, penalised).token_ids == [1, 1, 1], "3 falls to 1, once, 1 to 1.5"


def test_min_tokens_forbids_the_end() -> None:
    logits = torch.tensor([[9.0, 8.0, 1.0]])
    assert sample(logits, make_request(temperature=0, min_tokens=1)).token_ids == [1]
    stopping = make_request(temperature=0, min_tokens=1, stop_token_ids=(1,))
    assert sample(logits, stopping).token_ids == [2]
    assert sample(logits, make_request(temperature=0, min_tokens=1, output=(2,))).token_ids == [EOS]


def test_a_bias_is_added_before_penalties() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.5]])
    assert sample(logits, make_request(temperature=0, logit_bias={1: 3.0})).token_ids == [1]
    assert sample(logits, make_request(temperature=0, logit_bias={3: -100.0})).token_ids == [2]
    # 1 rises to 4, and is divided to 2.67; had it been divided first, it would be 3.67.
    penalised = make_request(tokens=(1,), temperature=0, logit_bias={1: 3.0}, repetition_penalty=1.5)
    assert sample(logits, penalised).token_ids == [3]


def test_only_allowed_tokens_are_chosen_by_whoever_asks_for_it() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.1, 0.3, 0.2]]))
    assert set(frequencies(logits, allowed_token_ids=(1, 3))) == {1, 3}
    assert frequencies(logits, allowed_token_ids=(1, 3, 3))[3] == pytest.approx(2 / 3, abs=0.03)
    choosy, plain = make_request(temperature=0, allowed_token_ids=(1,)), make_request(temperature=0)
    assert sample(logits.repeat(3, 1), plain, choosy, plain).token_ids == [0, 1, 0]


def test_min_tokens_and_allowed_tokens_go_together() -> None:
    logits = torch.tensor([[9.0, 8.0, 1.0]])
    params = {"temperature": 0, "min_tokens": 1, "allowed_token_ids": (EOS, 2)}
    assert sample(logits, make_request(**params)).token_ids == [2]
    assert sample(logits, make_request(**params, output=(2,))).token_ids == [EOS]


def test_logprobs_are_those_of_the_model_before_penalties() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.6, 0.3]]))
    request = make_request(tokens=(1,), temperature=0, repetition_penalty=50.0, logit_bias={0: -50.0}, logprobs=2)
    report = sample(logits.clone() + 5, request)
    assert report.token_ids == [2], "token 1 was in the prompt and is penalised"
    (found,) = report.logprobs
    assert found is not None
    assert found.logprob == pytest.approx(math.log(0.3), abs=1e-5)
    assert found.rank == 2
    assert [token for token, _ in found.top] == [1, 2]
    assert found.top[0][1] == pytest.approx(math.log(0.6), abs=1e-5)


def test_logprobs_can_be_wanted_by_some_and_with_no_alternatives() -> None:
    logits = torch.randn(3, VOCABULARY)
    report = sample(logits, make_request(), make_request(logprobs=0), make_request(logprobs=3))
    assert report.logprobs[0] is None
    assert report.logprobs[1] is not None and report.logprobs[1].top == []
    assert report.logprobs[2] is not None and len(report.logprobs[2].top) == 3
