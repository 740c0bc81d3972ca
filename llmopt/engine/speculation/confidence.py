"""What a drafter's own doubts tell of the target."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from math import prod

from llmopt.engine.speculation.acceptance_rate import AcceptanceRate

_EDGES = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96, 0.99, 1.0)
_MEMORY = 0.99


class Confidence:
    """How likely a drafted token is accepted by how likely its drafter found it: learnt, range by range, because a
    drafter may be surer than it is right, or right more often than it is sure."""

    def __init__(self) -> None:
        self._rates = [AcceptanceRate(_MEMORY, (low + high) / 2) for low, high in pairwise(_EDGES)]

    def __call__(self, likelihoods: Sequence[float]) -> float:
        """The probability that all drafted tokens are accepted that were found so likely."""
        return prod(self._of(likelihood).value for likelihood in likelihoods)

    def observe(self, likelihoods: Sequence[float], accepted: int) -> None:
        """Take in how many of some tokens, drafted after each other, were accepted."""
        for place, likelihood in enumerate(likelihoods[: accepted + 1]):
            self._of(likelihood).observe(1, int(place < accepted))

    def _of(self, likelihood: float) -> AcceptanceRate:
        return self._rates[bisect_right(_EDGES, likelihood, hi=len(_EDGES) - 1) - 1]
