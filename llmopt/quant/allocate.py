"""Spending a budget of bits where they count: one choice for each part of a model, the least loss that the budget buys.

Choosing is a knapsack with one choice of each kind. Its relaxation has a well-known answer (Sinha and Zoltners 1979,
"The Multiple-Choice Knapsack Problem"): of each part only the choices on the lower convex hull of loss against size
count, and the steps along all hulls are taken in the order of what they save for each bit. That is within one step of
the best that the budget can buy; what the last step leaves over is then spent on whatever still fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from llmopt.errors import InputError


@dataclass(frozen=True)
class Choice:
    """One way to store a part.

    Attributes:
        size: bits in all.
        loss: what it costs, such as divergence in nats; losses of different parts add up.
    """

    size: float
    loss: float


def allocate(parts: Sequence[Sequence[Choice]], budget: float) -> list[int]:
    """The number of the choice taken for each part, together of a size of at most `budget` and of little loss.

    The loss exceeds the least possible one by less than what a single step along one part's hull saves. Every part has
    a choice. Raises InputError where even the smallest choices exceed the budget.
    """
    hulls = [_hull(choices) for choices in parts]
    taken = [hull[0] for hull in hulls]
    left = budget - sum(parts[part][choice].size for part, choice in enumerate(taken))
    if left < 0:
        raise InputError("the budget is below the size of the smallest choices")
    steps = [
        (_saving_per_bit(parts[part][low], parts[part][high]), part, high)
        for part, hull in enumerate(hulls)
        for low, high in pairwise(hull)
    ]
    for _, part, choice in sorted(steps, key=lambda step: -step[0]):
        cost = parts[part][choice].size - parts[part][taken[part]].size
        if cost > left:
            break
        taken[part] = choice
        left -= cost
    _spend(parts, taken, left)
    return taken


def _hull(choices: Sequence[Choice]) -> list[int]:
    """The choices on the lower convex hull, from the smallest to the one of least loss."""
    hull: list[int] = []
    for choice in sorted(range(len(choices)), key=lambda i: (choices[i].size, choices[i].loss)):
        if hull and choices[choice].loss >= choices[hull[-1]].loss:
            continue
        while len(hull) > 1 and _saving_per_bit(choices[hull[-2]], choices[hull[-1]]) <= _saving_per_bit(
            choices[hull[-1]], choices[choice]
        ):
            hull.pop()
        hull.append(choice)
    return hull


def _saving_per_bit(low: Choice, high: Choice) -> float:
    return (low.loss - high.loss) / (high.size - low.size)


def _spend(parts: Sequence[Sequence[Choice]], taken: list[int], left: float) -> None:
    """Take, as long as there is one that fits, the change that saves most; choices off the hull count too."""
    while True:
        best = (0.0, -1, -1)
        for part, choices in enumerate(parts):
            now = choices[taken[part]]
            for number, choice in enumerate(choices):
                if choice.size - now.size <= left and now.loss - choice.loss > best[0]:
                    best = (now.loss - choice.loss, part, number)
        saved, part, number = best
        if saved <= 0:
            return
        left -= parts[part][number].size - parts[part][taken[part]].size
        taken[part] = number
