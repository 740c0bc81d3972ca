"""Who drafts tokens, as the engine sees it."""

from collections.abc import Callable, Sequence
from typing import Protocol

from llmopt.engine.request import Request
from llmopt.engine.scheduler import Chunk

GoesOn = Callable[[Request, Sequence[float], int], bool]
"""Whether another token is wanted for a request after some that a drafter found so likely, in a pass shared with
so many; see `DraftLength.goes_on`."""


class Drafter(Protocol):
    """Guesses how texts go on.

    A drafter decides nothing but speed: whatever it drafts, each token of the output is the one that the target chooses
    (`accepted`), so a bad guess costs time and no more.
    """

    def lag(self, request: Request) -> int | None:
        """How many tokens of a request this has yet to compute before it can draft for it; None where it cannot."""

    by_confidence: bool
    """Whether it says how likely it finds its tokens, and is stopped by that."""

    def draft(self, chunks: Sequence[Chunk], goes_on: GoesOn) -> None:
        """Put `chunk.drafted` tokens into the `drafts` of each chunk's request, or fewer but at least one where it does
        not go on.

        `lag` has given a number for each of these requests since it last changed, and its blocks hold the chunk.
        """

    def likelihoods(self, request: Request) -> Sequence[float]:
        """How likely it found each of the tokens that it drafted for a request last; none where it does not say."""

    def seconds(self, rows: int) -> float:
        """What a pass over this many rows takes, as far as is known; one more drafted token for each of n requests is a
        pass over n."""
