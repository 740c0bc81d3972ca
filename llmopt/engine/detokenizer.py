"""Tokens to text as they come: never half a character, never the beginning of a stop string."""

import codecs

from llmopt.engine.params import SamplingParams
from llmopt.model.tokenizer import Tokenizer


class Detokenizer:
    """Turns one request's output into text, piece by piece.

    Attributes:
        stopped_by: the stop string that ended the text, once one has.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.tokenizer = tokenizer
        self.params = params
        self.skipped = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        self.stopped_by: str | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # text not given out yet, because it may be the beginning of a stop string

    def add(self, token_id: int, check_stop: bool = True) -> str:
        """The text that is certain once this token is known; may be empty. Without `check_stop` no stop string that is
        complete with it ends the text, but one may begin."""
        if token_id in self.skipped:
            return ""
        return self._release(self._decoder.decode(self.tokenizer.token_bytes(token_id)), check_stop)

    def finish(self) -> str:
        """What was still held back; an unfinished character becomes U+FFFD."""
        if self.stopped_by is not None:
            return ""
        rest = self._release(self._decoder.decode(b"", final=True), check_stop=True)
        rest, self._held = rest + self._held, ""
        return rest

    def _release(self, text: str, check_stop: bool) -> str:
        stops = self.params.stop
        self._held += text
        found = [(self._held.index(stop), stop) for stop in stops if stop in self._held] if check_stop else []
        if found:
            start, self.stopped_by = min(found)
            end = start + len(self.stopped_by) if self.params.include_stop_str_in_output else start
        else:
            end = len(self._held) - max((_overlap(self._held, stop) for stop in stops), default=0)
        ready, self._held = self._held[:end], "" if found else self._held[end:]
        return ready


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
