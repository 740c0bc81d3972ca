"""Grids of GGUF's block types, found by least squares; those of K-quants have scales on two levels.

For every group some scales are tried. The codes that one of them makes of the weights are kept, and the scale (and
minimum) that leaves those codes the least squared error is computed rather than searched; so does llama.cpp
(`make_qkx2_quants` in `ggml/src/ggml-quants.c`). A K-quant then stores the scales of a super-block as small integers
times one factor, which moves all of them a little: so codes, factors and integers are fitted to one another in turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import inf

import torch
from torch import Tensor

from llmopt.quant.grid import Grid
from llmopt.weights.quantized import Scales, TwoLevel
from llmopt.weights.scheme import SUPER_BLOCK, Scheme

CANDIDATES = 13  # scales that are tried for a group
WIDEST, NARROWEST = 1.2, 0.94  # of the scale that just covers a group: another may fall better between its weights
TURNS = 2  # of fitting factors, integers and codes to one another
LEAST_IMPORTANCE = 1e-6  # of the mean, so that inputs that were never seen have a scale all the same
_INTEGERS = {"int6": (0, 63, torch.uint8), "int8": (-128, 127, torch.int8)}
_ELEMENTS_AT_ONCE = 1 << 18  # keeps temporaries in the cache
_TINY = 1e-30

_Found = tuple[Tensor, Tensor, Tensor]
"""Scale and minimum (or integers for them), and by how much they lessen the squared error: [rows, groups] each."""


def fit_k_grid(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Grid:
    """The grid for each group of a weight [out, groups, group size], float32.

    The scheme is one of GGUF's with integer codes. Squared errors are weighted by `importance` [groups, group size]
    (the mean square of each input) where it is given.
    """
    if importance is None:
        importance = torch.ones_like(weight[0])
    importance = importance / importance.mean().clamp(min=_TINY) + LEAST_IMPORTANCE
    fit = _fit_one_level if scheme.scales == "float16" else _fit_two_levels
    at_once = max(1, _ELEMENTS_AT_ONCE // weight[0].numel())
    scales, minimums = zip(*(fit(_Rows(part, importance, scheme)) for part in weight.split(at_once)), strict=True)
    return Grid(scheme, _joined(scales), minimums=_joined(minimums) if scheme.minimums else None)


def _fit_one_level(rows: "_Rows") -> tuple[Tensor, Tensor]:
    scale, minimum = rows.search()
    minimum = minimum.half().float()
    return rows.moments(scale, minimum).scale(minimum).half(), minimum.half()


def _fit_two_levels(rows: "_Rows") -> tuple[TwoLevel, TwoLevel]:
    lowest, highest, dtype = _INTEGERS[rows.scheme.scales]
    runs = rows.x.shape[0] * rows.x.shape[2] // SUPER_BLOCK
    scale, minimum = rows.search()
    # The integers of minimums are not negative, so that their factors are.
    scales, minimums = _rounded_to(scale, runs, lowest, highest), _rounded_to(minimum, runs, 0, 63)
    for _ in range(TURNS):
        moments = rows.moments(scales.float(), minimums.float())
        first, second = moments.of_runs(scales, minimums).fit(rows.bounds)
        factors = first.half().float(), second.half().float()
        scales, minimums = _fit_integers(moments, factors, rows.bounds, lowest, highest)
    return _stored(scales, dtype), _stored(minimums, torch.uint8)


class _Rows:
    """Some rows of a weight, with inputs in the first dimension, so that sums over a group run along whole vectors.

    Attributes:
        x: float32 [group size, rows, groups].
        bounds: of a minimum. There is none in symmetric schemes, and that of a K-quant is not above zero.
    """

    def __init__(self, weight: Tensor, importance: Tensor, scheme: Scheme) -> None:
        self.scheme = scheme
        self.x = weight.permute(2, 0, 1).contiguous()
        self.importance = importance.T[:, None].contiguous()
        self.weighted = self.x * self.importance
        self.sum_x, self.sum_one = self.weighted.sum(0), self.importance.sum(0)
        self.lowest = 0 if scheme.minimums else -(1 << (scheme.bits - 1))
        self.highest = self.lowest + scheme.largest_code
        self.bounds = (0.0, 0.0) if not scheme.minimums else (-inf, 0.0 if scheme.scales == "int6" else inf)

    def search(self) -> tuple[Tensor, Tensor]:
        """The best scale and minimum found for each group, float32 [rows, groups]."""
        covering, low = self._cover()
        best = self._refit(covering, low)
        for step in range(CANDIDATES):
            width = WIDEST - (WIDEST - NARROWEST) * step / (CANDIDATES - 1)
            best = _better(best, self._refit(covering * width, low))
        return _better(best, self._refit(*best[:2]))[:2]

    def moments(self, scale: Tensor, minimum: Tensor) -> "_Moments":
        """Of the weights with their nearest codes on this grid, less the middle code where that is the zero point."""
        numbers = (self.x - minimum).div_(_nonzero(scale)).round_().clamp_(self.lowest, self.highest)
        nx = (numbers * self.weighted).sum(0)
        weighted = numbers * self.importance
        return _Moments(weighted.sum(0), weighted.mul_(numbers).sum(0), nx, self.sum_x, self.sum_one)

    def _cover(self) -> tuple[Tensor, Tensor]:
        """The scale and minimum that just cover each group."""
        if self.scheme.minimums:
            low = self.x.amin(0).clamp(*self.bounds)
            return (self.x.amax(0) - low) / self.highest, low
        # The largest weight lies at the end that reaches further, whatever its sign.
        largest = self.x.gather(0, self.x.abs().argmax(0, keepdim=True))[0]
        return largest / self.lowest, torch.zeros_like(largest)

    def _refit(self, scale: Tensor, minimum: Tensor) -> _Found:
        """The best scale and minimum for the codes that these make, and their gain."""
        moments = self.moments(scale, minimum)
        fitted = moments.fit(self.bounds)
        return *fitted, moments.gain(*fitted)


@dataclass(frozen=True)
class _Moments:
    """What the squared error of a fit x ≈ scale · n + minimum depends on: weighted sums over each group.

    Attributes:
        n, nn, nx, x, one: the sums of n, n², n · x, x and 1, float32 [rows, groups].
    """

    n: Tensor
    nn: Tensor
    nx: Tensor
    x: Tensor
    one: Tensor

    def fit(self, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """The scale and minimum of the least error, the minimum within bounds."""
        determinant = self.one * self.nn - self.n * self.n
        free = (self.nn * self.x - self.n * self.nx) / _nonzero(determinant)
        flat = self.x / _nonzero(self.one)  # where all the numbers are one and the same
        minimum = torch.where(determinant > 1e-6 * self.one * self.nn, free, flat).clamp(*bounds)
        return self.scale(minimum), minimum

    def scale(self, minimum: Tensor) -> Tensor:
        """The best scale beside a given minimum."""
        return (self.nx - minimum * self.n) / _nonzero(self.nn)

    def gain(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """How much less the squared error is than that of zeros."""
        return scale * (2 * (self.nx - minimum * self.n) - scale * self.nn) + minimum * (
            2 * self.x - minimum * self.one
        )

    def of_runs(self, scales: TwoLevel, minimums: TwoLevel) -> "_Moments":
        """The same for the factors, of which scales and minimums are given multiples: sums over super-blocks."""
        s, m, runs = scales.values, minimums.values, scales.factors.shape[1]
        sums = self.n * s * m, self.nn * s * s, self.nx * s, self.x * m, self.one * m * m
        return _Moments(*(part.unflatten(1, (runs, -1)).sum(2) for part in sums))


def _rounded_to(wanted: Tensor, runs: int, lowest: int, highest: int) -> TwoLevel:
    """Numbers [rows, groups] on two levels, whole numbers and float16 factors, all still float32.

    The largest number of a run takes the integer that is furthest from 0.
    """
    grouped = wanted.unflatten(1, (runs, -1))
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))[..., 0]
    factors = (largest / (highest if -lowest < highest else lowest)).half().float()
    return TwoLevel(_integers(wanted, factors, lowest, highest), factors)


def _fit_integers(
    moments: _Moments, factors: tuple[Tensor, Tensor], bounds: tuple[float, float], lowest: int, highest: int
) -> tuple[TwoLevel, TwoLevel]:
    """The best integers for given codes and factors: the scale's nearest three, each with the minimum's best."""
    wanted, _ = moments.fit(bounds)
    nearest = _integers(wanted, factors[0], lowest, highest)

    def neighbour(step: int) -> _Found:
        integers = (nearest + step).clamp_(lowest, highest)
        scale = TwoLevel(integers, factors[0]).float()
        below = _integers((moments.x - scale * moments.n) / _nonzero(moments.one), factors[1], 0, 63)
        return integers, below, moments.gain(scale, TwoLevel(below, factors[1]).float())

    integers, below, _ = reduce(_better, map(neighbour, (0, -1, 1)))
    return TwoLevel(integers, factors[0]), TwoLevel(below, factors[1])


def _integers(wanted: Tensor, factors: Tensor, lowest: int, highest: int) -> Tensor:
    """The nearest multiples, as float32."""
    grouped = wanted.unflatten(1, (factors.shape[1], -1))
    return (grouped / _nonzero(factors)[..., None]).round_().clamp_(lowest, highest).flatten(1)


def _stored(numbers: TwoLevel, dtype: torch.dtype) -> TwoLevel:
    return TwoLevel(numbers.values.to(dtype), numbers.factors.half())


def _joined(parts: Sequence[Scales]) -> Scales:
    plain = [part for part in parts if isinstance(part, Tensor)]
    levels = [part for part in parts if isinstance(part, TwoLevel)]
    if plain:
        return torch.cat(plain)
    return TwoLevel(torch.cat([part.values for part in levels]), torch.cat([part.factors for part in levels]))


def _better(best: _Found, other: _Found) -> _Found:
    """For each group the one whose gain, which comes last, is larger; the first of equals."""
    better = other[-1] > best[-1]
    first, second, gain = (torch.where(better, new, old) for new, old in zip(other, best, strict=True))
    return first, second, gain


def _nonzero(numbers: Tensor) -> Tensor:
    return torch.where(numbers == 0, _TINY, numbers)
