"""How the rows of a step's logits are to be sampled: plain arrays, made on the host from what requests ask for.

The order, as `reference_sampling` defines it: bias, penalties, forbidden and allowed tokens; then temperature, top-k,
min-p, top-p, draw. All arrays are contiguous; R is the number of rows.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Draws(NamedTuple):
    """Random choices.

    Attributes:
        temperature: float32 [R], logits are divided by it; 0 takes the largest logit, and the rest does not matter.
        top_k: int64 [R], how many of the likeliest tokens stay; 0 for all.
        top_p: float32 [R], above 0: of what top-k and min-p leave, the likeliest tokens stay until together they have
            at least this share; 1 for all.
        min_p: float32 [R], tokens less likely than this times the likeliest go; 0 for none.
        uniform: float64 [R], a random number 0 <= uniform < 1.
    """

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    uniform: NDArray[np.float64]

    def of_rows(self, rows: NDArray[np.bool_]) -> "Draws":
        """Those of some rows, bool [R]."""
        return Draws(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.uniform[rows])

    def filtered(self) -> NDArray[np.bool_]:
        """bool [R]: which rows keep only their likeliest tokens."""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)


class TokenLists(NamedTuple):
    """Tokens of each row: int32 `tokens`, row r's from int64 starts[r] to starts[r + 1]; `starts` is [R + 1]."""

    starts: NDArray[np.int64]
    tokens: NDArray[np.int32]


class Bias(NamedTuple):
    """What is added to logits: float32 `values`, one for each token of lists that hold a token once in a row."""

    starts: NDArray[np.int64]
    tokens: NDArray[np.int32]
    values: NDArray[np.float32]


class Penalties(NamedTuple):
    """What tokens that a request has already cost.

    Attributes:
        repetition: float32 [R], above 0: divides a logit above 0 and multiplies one below, of all these tokens; 1 for
            no penalty.
        frequency: float32 [R], taken from a logit for each time that the output has the token.
        presence: float32 [R], taken from a logit where the output has the token.
        starts: int64 [R + 1], row r's tokens are starts[r] to starts[r + 1] of the two arrays below.
        tokens: int32, the tokens of prompt and output, each once.
        counts: int32, how often the output has each.
    """

    repetition: NDArray[np.float32]
    frequency: NDArray[np.float32]
    presence: NDArray[np.float32]
    starts: NDArray[np.int64]
    tokens: NDArray[np.int32]
    counts: NDArray[np.int32]


class SamplingBatch(NamedTuple):
    """What the rows of a step want; None where no row wants it.

    Attributes:
        draws: without them every row takes its largest logit.
        forbidden: tokens that must not be chosen.
        allowed: the only tokens that may be chosen; a row whose list is empty may have any.
    """

    draws: Draws | None = None
    bias: Bias | None = None
    penalties: Penalties | None = None
    forbidden: TokenLists | None = None
    allowed: TokenLists | None = None
