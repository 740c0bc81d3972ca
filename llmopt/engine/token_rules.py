"""Which tokens a request favours and which it rules out, worked out once from its parameters."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llmopt.engine.params import SamplingParams
from llmopt.errors import InputError
from llmopt.model.tokenizer import Tokenizer


class TokenRules:
    """The rules of one request, in the form in which a step's batch takes them.

    Attributes:
        bias_tokens, bias_values: int32 and float32 [n], what is added to the logits of tokens.
        allowed: int32 [n], the only tokens that may be chosen; none where all may.
    """

    def __init__(
        self,
        bias: Mapping[int, float] | None = None,
        allowed: Iterable[int] = (),
        ends: Iterable[int] = (),
        min_tokens: int = 0,
        bad_words: Iterable[Sequence[int]] = (),
    ) -> None:
        """`ends` must not be chosen before `min_tokens` tokens; bad words are sequences of at least one token.

        Raises InputError where nothing would be left to choose at once.
        """
        bias = bias or {}
        self.bias_tokens: NDArray[np.int32] = np.fromiter(bias.keys(), np.int32, len(bias))
        self.bias_values: NDArray[np.float32] = np.fromiter(bias.values(), np.float32, len(bias))
        self._allowed = frozenset(allowed)
        self.allowed: NDArray[np.int32] = np.fromiter(self._allowed, np.int32, len(self._allowed))
        self._ends = frozenset(ends)
        self._min_tokens = min_tokens
        words = [tuple(word) for word in bad_words]
        self._bad_tokens = frozenset(word[0] for word in words if len(word) == 1)
        self._bad_words: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)  # by the token before the last
        for word in words:
            if len(word) > 1:
                self._bad_words[word[-2]].append(word)
        if self._leaves_nothing(self._ruled_out(0)):
            raise InputError("nothing is left to choose: bad_words or min_tokens rule out all of allowed_token_ids")

    @classmethod
    def of(cls, params: SamplingParams, tokenizer: Tokenizer, end_ids: frozenset[int], vocab_size: int) -> "TokenRules":
        """The rules of a request. Raises InputError where they cannot be met."""
        words = [tokens for word in params.bad_words for tokens in _spellings(word, tokenizer)]
        ends = end_ids.union(params.stop_token_ids) if params.min_tokens else ()
        if not (params.logit_bias or params.allowed_token_ids or ends or words):
            return NO_RULES
        return cls(
            params.logit_bias,
            params.allowed_token_ids or (),
            ends,
            params.min_tokens,
            [word for word in words if max(word) < vocab_size],  # the model cannot choose any other
        )

    def forbidden(self, tokens: Sequence[int], prompt_length: int) -> frozenset[int]:
        """What must not come next after a request's tokens, its prompt and then its output."""
        output_length = len(tokens) - prompt_length
        always = self._ruled_out(output_length)
        if not self._bad_words or output_length == 0:
            return always
        found = always | self._completing(tokens, output_length)
        # Where longer bad words would take the last token that is allowed, they give way: the text must go on.
        return always if self._leaves_nothing(found) else found

    def _ruled_out(self, output_length: int) -> frozenset[int]:
        """What is forbidden at this length, whatever the output is."""
        return self._bad_tokens | self._ends if output_length < self._min_tokens else self._bad_tokens

    def _leaves_nothing(self, forbidden: frozenset[int]) -> bool:
        return bool(self._allowed) and self._allowed <= forbidden

    def _completing(self, tokens: Sequence[int], output_length: int) -> set[int]:
        """The last tokens of the bad words whose other tokens are the latest of the output."""
        return {
            word[-1]
            for word in self._bad_words.get(tokens[-1], ())
            if len(word) - 1 <= output_length and tuple(tokens[1 - len(word) :]) == word[:-1]
        }


NO_RULES = TokenRules()


@lru_cache(maxsize=1024)  # every choice of a request has the same words
def _spellings(word: str, tokenizer: Tokenizer) -> frozenset[tuple[int, ...]]:
    """The tokens of a word at the beginning of a text and after a space, which many tokenizers make part of a token."""
    bare = word.lstrip()
    spellings = frozenset(tuple(tokenizer.encode(start + bare, add_special_tokens=False)) for start in ("", " "))
    if () in spellings:
        raise InputError(f"the bad word {word!r:.80} makes no tokens")
    return spellings
