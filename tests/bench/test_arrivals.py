import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.bench.arrivals import arrival_times
from llmopt.errors import InputError


@given(st.integers(1, 200), st.floats(0.1, 1000), st.floats(0.1, 10), st.integers(0, 2**32))
def test_times_rise_from_zero_and_follow_the_seed(count, rate, burstiness, seed):
    times = arrival_times(count, rate, burstiness, seed)
    assert times.shape == (count,) and times[0] == 0
    assert (np.diff(times) >= 0).all()
    assert (times == arrival_times(count, rate, burstiness, seed)).all()


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_of_their_distribution(burstiness):
    gaps = np.diff(arrival_times(40_001, 5.0, burstiness, seed=1))
    variation = 1 / math.sqrt(burstiness)  # standard deviation / mean of a gamma distribution
    assert gaps.mean() == pytest.approx(0.2, rel=6 * variation / math.sqrt(40_000))
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


def test_an_infinite_rate_is_all_at_once():
    assert not arrival_times(5, math.inf, 1.0, seed=0).any()


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (math.nan, 1), (1, 0), (1, math.inf), (1, math.nan)])
def test_impossible_settings_are_refused(rate, burstiness):
    with pytest.raises(InputError, match="must be above 0"):
        arrival_times(5, rate, burstiness, seed=0)
