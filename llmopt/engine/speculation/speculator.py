"""What the engine does about speculation before, in and after a step."""

import time
from collections.abc import Callable, Sequence

from llmopt.engine.outputs import SpeculationStats
from llmopt.engine.request import Request
from llmopt.engine.scheduler import Chunk
from llmopt.engine.speculation.acceptance import accepted
from llmopt.engine.speculation.draft_length import Candidate, DraftLength
from llmopt.engine.speculation.drafter import Drafter


class Speculator:
    """Says how many tokens are to be drafted for whom, has them drafted, and learns from what became of them."""

    def __init__(self, drafter: Drafter, most: int) -> None:
        """`most` tokens at most are drafted for a request in a step."""
        self.drafter = drafter
        self.most = most
        self.length = DraftLength(drafter.seconds, by_confidence=drafter.by_confidence)
        self._drafts = self._drafted = 0
        self._accepted = [0] * most
        self._begun = 0.0

    def plan(self, running: Sequence[Request], left: Callable[[Request], int]) -> None:
        """Set how many tokens are wanted `ahead` of each running request that decodes; `left` says how many may come.

        None beyond those: of n drafted tokens a step may give n + 1.
        """
        decoding = []
        for request in running:
            request.ahead = 0
            if request.output_length and request.known - request.computed == 1:
                decoding.append(request)
        candidates = [one for request in decoding if (one := self._candidate(request, left(request))) is not None]
        if candidates:
            lengths = self.length.choose(candidates, len(decoding))
            for candidate, length in zip(candidates, lengths, strict=True):
                candidate.request.ahead = length

    def draft(self, chunks: list[Chunk]) -> list[Chunk]:
        """Have the tokens drafted for which the scheduler has found room; the chunks with as many as there are now."""
        due = [chunk for chunk in chunks if chunk.drafted]
        if due:
            self.drafter.draft(due, self.length.goes_on)
            chunks = [chunk.with_drafts(len(chunk.request.drafts)) if chunk.drafted else chunk for chunk in chunks]
        self._begun = time.perf_counter()
        return chunks

    def verify(self, chunk: Chunk, chosen: Sequence[int]) -> Sequence[int]:
        """The next tokens of a chunk's request: see `accepted`."""
        tokens = accepted(chunk.request.drafts[: chunk.drafted], chosen)
        if chunk.drafted:
            count = len(tokens) - 1
            self.length.observe(chunk.request, chunk.drafted, count, self.drafter.likelihoods(chunk.request))
            self._drafts += 1
            self._drafted += chunk.drafted
            for place in range(count):
                self._accepted[place] += 1
        return tokens

    def observe(self, chunks: Sequence[Chunk]) -> None:
        """Learn from a step that is done what it took, if every request in it was decoding."""
        if all(chunk.count == chunk.drafted + 1 for chunk in chunks):
            self.length.observe_step(sum(chunk.count for chunk in chunks), time.perf_counter() - self._begun)

    def stats(self) -> SpeculationStats:
        return SpeculationStats(self._drafts, self._drafted, sum(self._accepted), list(self._accepted))

    def _candidate(self, request: Request, left: int) -> Candidate | None:
        most = min(self.most, left - 1)
        lag = self.drafter.lag(request) if most > 0 else None
        return None if lag is None else Candidate(request, most, left, lag)
