"""From numbers per token to one number with a confidence interval. Imports no torch."""

import math
from collections.abc import Callable

import numpy as np

RESAMPLES = 1000

Interval = tuple[float, float]


def perplexity(nll: np.ndarray) -> float:
    """exp of the mean negative log-likelihood (nats a token), at most e⁷⁰⁰, which is still a number."""
    return math.exp(min(nll.mean(), 700.0))


def perplexity_ratio(nll: np.ndarray, reference_nll: np.ndarray) -> float:
    """Perplexity / the reference's perplexity on the same tokens, which makes it a paired number."""
    return perplexity(nll - reference_nll)


def bootstrap(
    windows: int, statistic: Callable[[np.ndarray], float], confidence: float, seed: int = 0, resamples: int = RESAMPLES
) -> Interval | None:
    """A two-sided percentile interval of a statistic, resampling whole windows with replacement (Efron 1979; blocks as
    in Künsch 1989), because the tokens of one window are not independent of each other.

    `statistic` is called with int64 [windows], the windows drawn. None of fewer than two windows, which say nothing
    about how windows differ. With few windows (under about 10) such intervals are somewhat too narrow.
    """
    if windows < 2:
        return None
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, windows, size=windows)) for _ in range(resamples)]
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
