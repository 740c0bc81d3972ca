"""The budget is kept, and what it buys is nearly the best that there is."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.errors import InputError
from llmopt.quant.allocate import Choice, allocate

CHOICES = st.builds(Choice, st.integers(1, 40), st.floats(0, 10))
PARTS = st.lists(st.lists(CHOICES, min_size=1, max_size=4), min_size=1, max_size=4)


def smallest(parts: list[list[Choice]]) -> int:
    return int(sum(min(choice.size for choice in part) for part in parts))


def totals(parts: list[list[Choice]], taken: list[int]) -> tuple[float, float]:
    chosen = [part[number] for part, number in zip(parts, taken, strict=True)]
    return sum(choice.size for choice in chosen), sum(choice.loss for choice in chosen)


def least_loss(parts: list[list[Choice]], budget: float) -> float:
    found = [totals(parts, taken) for taken in product(*(range(len(part)) for part in parts))]
    return min(loss for size, loss in found if size <= budget)


@given(PARTS, st.integers(0, 60))
def test_never_over_the_budget_and_within_one_step_of_the_best(parts: list[list[Choice]], more: int) -> None:
    budget = smallest(parts) + more
    size, loss = totals(parts, allocate(parts, budget))
    largest_step = max(max(c.loss for c in part) - min(c.loss for c in part) for part in parts)
    assert size <= budget
    assert loss <= least_loss(parts, budget) + largest_step + 1e-9


@given(PARTS, st.integers(0, 60), st.integers(0, 60))
def test_more_budget_never_costs_more_than_a_step(parts: list[list[Choice]], more: int, still_more: int) -> None:
    budget = smallest(parts) + more
    _, loss = totals(parts, allocate(parts, budget))
    _, later = totals(parts, allocate(parts, budget + still_more))
    largest_step = max(max(c.loss for c in part) - min(c.loss for c in part) for part in parts)
    assert later <= loss + largest_step + 1e-9


@given(PARTS)
def test_a_budget_for_everything_buys_the_least_loss_of_every_part(parts: list[list[Choice]]) -> None:
    _, loss = totals(parts, allocate(parts, sum(max(choice.size for choice in part) for part in parts)))
    assert loss == sum(min(choice.loss for choice in part) for part in parts)


def test_bits_go_where_they_save_most() -> None:
    sensitive, indifferent = [Choice(4, 1.0), Choice(8, 0.1)], [Choice(4, 0.2), Choice(8, 0.1)]
    assert allocate([indifferent, sensitive, indifferent], budget=16) == [0, 1, 0]


def test_what_is_left_is_spent_on_a_smaller_step() -> None:
    """The step that saves most for each bit does not fit; another does."""
    large, small = [Choice(10, 9.0), Choice(30, 0.0)], [Choice(10, 1.0), Choice(15, 0.9)]
    assert allocate([large, small], budget=35) == [0, 1]


def test_a_choice_that_is_larger_and_no_better_is_never_taken() -> None:
    assert allocate([[Choice(4, 1.0), Choice(6, 1.0), Choice(8, 2.0)]], budget=100) == [0]


def test_a_budget_below_the_smallest_choices_is_refused() -> None:
    with pytest.raises(InputError, match="below"):
        allocate([[Choice(4, 1.0)], [Choice(5, 1.0)]], budget=8.5)
