"""Drafts from the request's own text: what followed the latest tokens when they came before (prompt lookup)."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from llmopt.engine.request import Request
from llmopt.engine.scheduler import Chunk
from llmopt.engine.speculation.drafter import GoesOn


class NgramDrafter:
    """Looks up the longest run of a request's latest tokens, `shortest` to `longest` of them, that it has had before,
    and drafts what came after it the last time; where that reaches the end of the text it goes on with the draft, so
    that a text that repeats itself is drafted as far as is wanted.

    Saxena 2023 (github.com/apoorvumang/prompt-lookup-decoding); there the search takes the first place that fits.
    """

    by_confidence = False

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest = shortest
        self.longest = longest
        self._texts: WeakKeyDictionary[Request, _Text] = WeakKeyDictionary()

    def lag(self, request: Request) -> int | None:
        text = self._texts.get(request)
        if text is None:
            text = self._texts[request] = _Text(self.shortest, self.longest)
        text.catch_up(request.tokens)
        return 0 if text.next_place is not None else None

    def draft(self, chunks: Sequence[Chunk], goes_on: GoesOn) -> None:
        for chunk in chunks:
            request = chunk.request
            place = self._texts[request].next_place or 0
            drafts = request.tokens[place : place + chunk.drafted]
            while len(drafts) < chunk.drafted:
                drafts.append(drafts[place + len(drafts) - request.known])
            request.drafts = drafts

    def likelihoods(self, request: Request) -> Sequence[float]:
        return ()

    def seconds(self, rows: int) -> float:
        return 0.0


class _Text:
    """Where the runs of tokens in one request's text stand, kept from step to step.

    Attributes:
        next_place: of the token that followed the latest tokens when they came before; None where they did not.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._places: dict[tuple[int, ...], int] = {}  # of the token after a run, the last time that it came
        self._seen = 0
        self.next_place: int | None = None

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Take in the tokens that are new since the last call."""
        if self._seen == len(tokens):
            return
        for end in range(max(self._seen, 1), len(tokens)):  # the run at the very end has nothing after it yet
            for length in self._lengths:
                if length <= end:
                    self._places[tuple(tokens[end - length : end])] = end
        self._seen = len(tokens)
        found = (self._places.get(tuple(tokens[-length:])) for length in self._lengths if length <= len(tokens))
        self.next_place = next((place for place in found if place is not None), None)
