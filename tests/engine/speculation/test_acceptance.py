"""What is accepted is what the target chooses, and has its distribution."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.backend.reference import ReferenceBackend
from llmopt.engine.params import SamplingParams
from llmopt.engine.request import Request
from llmopt.engine.row import Row
from llmopt.engine.sampler import Sampler
from llmopt.engine.speculation.acceptance import accepted
from llmopt.engine.token_rules import TokenRules

TOKENS = 5
TARGET = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5])
DRAFT = torch.tensor([1.5, 1.2, 0.5, 0.3, -0.2])
DRAWS = 4000
LIMIT = 18.5  # chi-square at 0.1% for four degrees of freedom; seeds are fixed, so this never flickers


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_the_chosen_tokens_up_to_the_first_that_differs(drafts, chosen) -> None:
    chosen = chosen[: len(drafts) + 1]
    tokens = accepted(drafts, chosen)
    count = len(tokens) - 1
    assert tokens == chosen[: count + 1]
    assert drafts[:count] == chosen[:count]
    assert count == len(drafts) or drafts[count] != chosen[count]


def sampled(logits: torch.Tensor, rows: list[Row]) -> list[int]:
    return Sampler(ReferenceBackend())(logits.expand(len(rows), -1).clone(), rows).token_ids


def certain(requests: list[Request]) -> list[int]:
    """As n-grams do: a guess without any doubt."""
    return [1] * len(requests)


def drawn(requests: list[Request]) -> list[int]:
    """As a draft model does: from a distribution of its own."""
    return sampled(DRAFT, [Row(request) for request in requests])


@pytest.mark.parametrize("draft", [certain, drawn])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.9}, {"logit_bias": {4: 2.0}}])
def test_what_stands_has_the_distribution_of_the_target(draft: Callable, params: dict) -> None:
    wanted = SamplingParams(**params)
    rules = TokenRules(wanted.logit_bias)
    requests = [Request(str(seed), [1, 2], wanted, seed, rules) for seed in range(DRAWS)]
    drafts = draft(requests)
    rows = [
        row for request, token in zip(requests, drafts, strict=True) for row in (Row(request), Row(request, [token]))
    ]
    chosen = sampled(TARGET, rows)
    texts = [accepted([token], chosen[2 * i : 2 * i + 2]) for i, token in enumerate(drafts)]
    assert 0 < sum(len(text) == 2 for text in texts) < DRAWS
    logits = TARGET.double()
    for token, bias in (wanted.logit_bias or {}).items():
        logits[token] += bias
    p = (logits / wanted.temperature).softmax(-1)
    ranked = p.sort(descending=True)
    keep = torch.ones(TOKENS, dtype=torch.bool)
    keep[ranked.indices[(ranked.values.cumsum(0) - ranked.values) >= wanted.top_p]] = False
    if wanted.top_k:
        keep[ranked.indices[wanted.top_k :]] = False
    p = torch.where(keep, p, 0) / p[keep].sum()
    for place in (0, 1):  # of those that have a second token too
        found = Counter(text[place] for text in texts if len(text) > place)
        total = sum(found.values())
        if place == 1:
            assert total > 300
        assert all(p[token] > 0 for token in found)
        assert sum((found[i] - total * float(q)) ** 2 / (total * float(q)) for i, q in enumerate(p) if q > 0) < LIMIT


def test_a_draft_by_the_same_random_number_is_accepted_more_often_than_its_likeliest_token() -> None:
    requests = [Request(str(seed), [1, 2], SamplingParams(), seed) for seed in range(DRAWS)]
    chosen = sampled(TARGET, [Row(request) for request in requests])
    agree = sum(a == b for a, b in zip(chosen, drawn(requests), strict=True)) / DRAWS
    p, q = TARGET.softmax(-1), DRAFT.softmax(-1)
    most = float(torch.minimum(p, q).sum())  # what rejection sampling reaches
    assert float(p[q.argmax()]) < agree <= most + 0.03
