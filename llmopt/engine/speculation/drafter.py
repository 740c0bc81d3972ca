"""Who drafts tokens, as the engine sees it."""

from collections.abc import Sequence
from typing import Protocol

from llmopt.engine.request import Request
from llmopt.engine.scheduler import Chunk


class Drafter(Protocol):
    """Guesses how texts go on.

    A drafter decides nothing but speed: whatever it drafts, each token of the output is the one that the target chooses
    (`accepted`), so a bad guess costs time and no more.
    """

    def lag(self, request: Request) -> int | None:
        """How many tokens of a request this has yet to compute before it can draft for it; None where it cannot."""

    def draft(self, chunks: Sequence[Chunk]) -> None:
        """Put `chunk.drafted` tokens, at least one, into the `drafts` of each chunk's request.

        `lag` has given a number for each of these requests since it last changed, and its blocks hold the chunk.
        """

    def seconds(self, rows: int) -> float:
        """What a pass over this many rows takes, as far as is known; one more drafted token for each of n requests is a
        pass over n."""
