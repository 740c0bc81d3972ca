"""Which tokens a request has, and how often its output has them: what penalties are counted by."""

from array import array
from collections.abc import Sequence


class TokenCounts:
    """The distinct tokens of prompt and output, kept from step to step, so that a step counts only what is new.

    Attributes:
        tokens: each token once, in the order in which they came.
        counts: how often the output has each of them; 0 for those of the prompt alone.
    """

    def __init__(self) -> None:
        self.tokens = array("i")
        self.counts = array("i")
        self._places: dict[int, int] = {}
        self._counted = 0

    def catch_up(self, tokens: Sequence[int], prompt_length: int) -> None:
        """Count what a request's tokens, its prompt and then its output, have more than at the last call."""
        for position in range(self._counted, len(tokens)):
            place = self._places.setdefault(tokens[position], len(self.tokens))
            if place == len(self.tokens):
                self.tokens.append(tokens[position])
                self.counts.append(0)
            if position >= prompt_length:
                self.counts[place] += 1
        self._counted = len(tokens)

    def followed_by(self, drafts: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """`tokens` and `counts` as they would be with these next in the output; nothing changes here."""
        if not drafts:
            return self.tokens, self.counts
        tokens, counts, places = self.tokens[:], self.counts[:], dict[int, int]()
        for token in drafts:
            place = self._places.get(token, places.get(token, len(tokens)))
            if place == len(tokens):
                places[token] = place
                tokens.append(token)
                counts.append(0)
            counts[place] += 1
        return tokens, counts
