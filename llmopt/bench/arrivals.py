"""When requests are due. All times are drawn before the first request is sent, so that a slow server or a late
timer shifts no later request: a schedule that sleeps after each send drifts and hides the waiting it causes."""

import math

import numpy as np

from llmopt.errors import InputError


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> np.ndarray:
    """Seconds after the start at which `count` requests are due: float64 [count], rising from 0.

    Gaps are gamma distributed with mean 1 / rate and shape `burstiness`: 1 is a Poisson process, less is burstier,
    more is steadier (vLLM's parameters). An infinite rate makes every request due at once.

    Raises InputError for a rate or a burstiness that is not positive.
    """
    if not rate > 0:
        raise InputError(f"--request-rate must be above 0 requests per second, not {rate}; inf sends all at once")
    if not 0 < burstiness < math.inf:
        raise InputError(f"--burstiness must be above 0 and finite, not {burstiness}; 1 is a Poisson process")
    if math.isinf(rate):
        return np.zeros(count)
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), size=count)
    gaps[0] = 0.0  # nothing can be learnt from waiting for the first request
    return np.cumsum(gaps)
