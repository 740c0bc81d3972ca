"""Divergence against plain float64 formulas, written the long way."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmopt.errors import InputError, LlmoptError
from llmopt.evaluate.divergence import compare, log_likelihoods


def naive(logits: list[float]) -> list[float]:
    total = math.fsum(math.exp(x - max(logits)) for x in logits)
    return [math.exp(x - max(logits)) / total for x in logits]


@given(st.integers(1, 150), st.integers(2, 12), st.integers(0, 2**31), st.floats(0.1, 20))
def test_every_number_is_that_of_the_formula(rows, vocabulary, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(rows, vocabulary, generator=generator) * scale
    model = truth + torch.randn(rows, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    found = compare(truth, model, targets)
    for row in range(rows):
        p, q = naive(truth[row].tolist()), naive(model[row].tolist())
        kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        assert found.kl[row] == pytest.approx(kl, rel=1e-9, abs=1e-12)
        assert found.nll[row] == pytest.approx(-math.log(q[targets[row]]), rel=1e-9, abs=1e-12)
        assert found.reference_nll[row] == pytest.approx(-math.log(p[targets[row]]), rel=1e-9, abs=1e-12)
        assert found.same_top[row] == (np.argmax(p) == np.argmax(q))
    assert (log_likelihoods(model, targets) == found.nll).all()


def test_a_model_does_not_diverge_from_itself():
    logits = torch.randn(100, 50) * 10
    found = compare(logits, logits.clone(), torch.zeros(100, dtype=torch.int64))
    assert (found.kl == 0).all() and found.same_top.all()


def test_a_small_divergence_is_not_lost_in_rounding():
    """Second order: KL of a perturbation e is Var_p(e) / 2, here 5e-9 a position, far below float32's rounding."""
    truth = torch.randn(64, 5000, dtype=torch.float64)
    noise = torch.randn(64, 5000, dtype=torch.float64) * 1e-4
    p = truth.softmax(dim=1)
    expected = ((p * noise**2).sum(1) - (p * noise).sum(1) ** 2) / 2
    found = compare(truth, truth + noise, torch.zeros(64, dtype=torch.int64))
    assert found.kl == pytest.approx(expected.numpy(), rel=0.01)


def test_an_empty_block_is_no_trouble():
    """The last position of a window predicts nothing, and may be a block of its own."""
    empty, none = torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    assert compare(empty, empty, none).kl.shape == (0,)
    assert log_likelihoods(empty, none).shape == (0,)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(value):
    broken = torch.zeros(3, 5)
    broken[1, 2] = value
    with pytest.raises(LlmoptError, match="not finite") as raised:
        compare(torch.zeros(3, 5), broken, torch.zeros(3, dtype=torch.int64))
    assert raised.value.exit_status == 3


def test_vocabularies_of_different_sizes_are_refused():
    with pytest.raises(InputError, match="vocabulary of 6 and the reference one of 5"):
        compare(torch.zeros(3, 5), torch.zeros(3, 6), torch.zeros(3, dtype=torch.int64))
