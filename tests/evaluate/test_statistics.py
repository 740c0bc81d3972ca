import math

import numpy as np
import pytest

from llmopt.evaluate.statistics import bootstrap, perplexity, perplexity_ratio


def test_perplexity_is_exp_of_the_mean():
    assert perplexity(np.log([[2.0, 8.0]])) == pytest.approx(4.0)
    assert perplexity(np.array([1e9])) == math.exp(700)


def test_the_ratio_is_of_the_two_perplexities():
    nll, reference = np.array([1.0, 3.0]), np.array([0.5, 2.5])
    assert perplexity_ratio(nll, reference) == pytest.approx(perplexity(nll) / perplexity(reference))


def test_the_interval_of_a_mean_is_that_of_theory():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=400)
    low, high = bootstrap(400, lambda drawn: values[drawn].mean(), confidence=0.95)
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=half / 4)
    assert high == pytest.approx(values.mean() + half, abs=half / 4)


def test_whole_windows_are_resampled_not_tokens():
    """Windows of equal tokens: only the differences between windows count, however many tokens there are."""
    means = np.random.default_rng(0).normal(size=20)
    narrow, wide = np.repeat(means[:, None], 10, axis=1), np.repeat(means[:, None], 1000, axis=1)
    one, other = (bootstrap(20, lambda drawn, v=v: v[drawn].mean(), 0.95) for v in (narrow, wide))
    assert one == pytest.approx(other)


def test_more_confidence_is_a_wider_interval_and_the_seed_decides():
    values = np.random.default_rng(0).normal(size=30)

    def mean(drawn):
        return values[drawn].mean()

    narrow, wide = bootstrap(30, mean, 0.8), bootstrap(30, mean, 0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert narrow == bootstrap(30, mean, 0.8) != bootstrap(30, mean, 0.8, seed=1)


def test_one_window_has_no_interval():
    assert bootstrap(1, lambda drawn: 0.0, 0.95) is None
