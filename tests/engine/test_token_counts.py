"""Counting what is new at each step comes to the same as counting everything."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from llmopt.engine.token_counts import TokenCounts


@given(st.lists(st.integers(0, 5)), st.lists(st.lists(st.integers(0, 5))))
def test_step_by_step_as_at_once(prompt: list[int], outputs: list[list[int]]) -> None:
    counts, known = TokenCounts(), list(prompt)
    for output in outputs:
        known += output
        counts.catch_up(known, len(prompt))
        expected = dict.fromkeys(known, 0) | Counter(known[len(prompt) :])
        assert dict(zip(counts.tokens, counts.counts, strict=True)) == expected
        assert len(counts.tokens) == len(expected)
