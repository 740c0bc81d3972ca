"""Prompt lookup drafts what followed the latest tokens the last time, whatever the steps in which it saw them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.engine.params import SamplingParams
from llmopt.engine.request import Request
from llmopt.engine.scheduler import Chunk
from llmopt.engine.speculation.ngram import NgramDrafter

SHORTEST, LONGEST, WANTED = 2, 3, 6


def expected(tokens: list[int]) -> list[int] | None:
    """The definition, by looking at every place."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                text = list(tokens)
                while len(text) < len(tokens) + WANTED:
                    text.append(text[end + len(text) - len(tokens)])
                return text[len(tokens) :]
    return None


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=12), st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=9)
)
def test_drafts_are_what_came_after_the_longest_run_the_last_time(prompt, steps) -> None:
    drafter, request = NgramDrafter(SHORTEST, LONGEST), Request("r", prompt, SamplingParams(), 0)
    for more in ([], *steps):
        request.tokens += more
        wanted = expected(request.tokens)
        assert drafter.lag(request) == (None if wanted is None else 0)
        if wanted is not None:
            drafter.draft([Chunk(request, request.known - 1, 1 + WANTED, WANTED)], lambda *_: True)
            assert request.drafts == wanted


def test_requests_are_apart_and_their_texts_go_with_them() -> None:
    drafter = NgramDrafter(1, 1)
    one, other = (Request(name, tokens, SamplingParams(), 0) for name, tokens in (("a", [5, 6, 5]), ("b", [5])))
    assert (drafter.lag(one), drafter.lag(other)) == (0, None)
    assert len(drafter._texts) == 2
    del one
    assert len(drafter._texts) == 1
