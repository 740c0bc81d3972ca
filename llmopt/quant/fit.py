"""Fitting grids to weights: the ranges that leave the least error once every weight has taken its nearest code."""

from collections.abc import Iterable, Iterator
from math import ceil, log2

import torch
from torch import Tensor

from llmopt.quant.grid import SMALLEST_SCALE, Grid, middle
from llmopt.quant.k_grid import fit_k_grid
from llmopt.weights.numbers import FP8, INT, LARGEST
from llmopt.weights.quantized import TwoLevel
from llmopt.weights.scheme import Scheme

LEAST_SHRINK = 0.5
ROUND_UP_FROM = 1.75  # a largest weight of this mantissa or more would round up to the next power of two
_SMALLEST_FP8 = 2.0**-9
_ELEMENTS_AT_ONCE = 1 << 20  # keeps the search's temporaries in the cache and its memory small


def fit_grid(weight: Tensor, scheme: Scheme, importance: Tensor | None = None, steps: int = 1) -> Grid:
    """The grid for each group of a weight [out, groups, group size], float32.

    With one step the range of the group is covered exactly. With more, the range is shrunk in that many steps down
    to a half, and the step with the least squared error is taken, each input weighted by `importance` [groups, group
    size] (the mean square of that input) where it is given. GGUF's integer types are always searched, as its users
    expect, by `fit_k_grid`.
    """
    if scheme.gguf_type is not None and scheme.number == INT:
        return fit_k_grid(weight, scheme, importance)
    if scheme.scales == "fp8":
        # One factor for the whole weight, a power of two, so that its inverse, which files hold, is exact.
        largest = max(float(weight.abs().max()) / LARGEST[scheme.number], SMALLEST_SCALE)
        factor = 2.0 ** ceil(log2(largest / LARGEST[FP8]))
    else:
        factor = 1.0
    rows = max(1, _ELEMENTS_AT_ONCE // weight[0].numel())
    parts = [_fit_rows(part, scheme, factor, importance, steps) for part in weight.split(rows)]
    scale, zero = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return _stored(scale, zero, scheme, factor)


def best_of(candidates: Iterable[tuple[tuple[Tensor, Tensor], Tensor]]) -> tuple[Tensor, Tensor]:
    """For each group the scale and zero of the least loss [out, groups]; the first of equals."""
    (best, least), *others = candidates
    for tensors, loss in others:
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better, tensors[0], best[0]), torch.where(better, tensors[1], best[1])
    return best


def _stored(scale: Tensor, zero: Tensor, scheme: Scheme, factor: float) -> Grid:
    """The grid of chosen scales, which `_storable` has rounded, and zero points."""
    if scheme.scales == "fp8":
        values = (scale / factor).to(torch.float8_e4m3fn)
        return Grid(scheme, TwoLevel(values, torch.tensor([[factor]])))
    scales = scale.to({"float16": torch.float16, "e8m0": torch.float8_e8m0fnu}.get(scheme.scales, torch.float32))
    return Grid(scheme, scales, zeros=None if scheme.symmetric else zero)


def _fit_rows(
    weight: Tensor, scheme: Scheme, factor: float, importance: Tensor | None, steps: int
) -> tuple[Tensor, Tensor]:
    candidates = _candidates(weight, scheme, factor, steps)
    if steps == 1:
        return next(candidates)
    return best_of((found, _stored(*found, scheme, factor).losses(weight, importance)) for found in candidates)


def _candidates(weight: Tensor, scheme: Scheme, factor: float, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and zero points, each [out, groups], the one that covers the range first."""
    if scheme.scales == "e8m0":
        exponent = _power_of_two(weight.abs().amax(-1), scheme)
        for step in (0, -1, 1)[:steps]:
            yield torch.exp2(exponent + step), torch.zeros_like(exponent)
        return
    low, high = _reach(weight, scheme)
    for step in range(steps):
        shrink = 1 - (1 - LEAST_SHRINK) * step / steps
        yield _cover(low * shrink, high * shrink, scheme, factor)


def _reach(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The range of each group, which holds zero and is symmetric where the scheme is."""
    if scheme.symmetric:
        high = weight.abs().amax(-1)
        return -high, high
    return weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)


def _cover(low: Tensor, high: Tensor, scheme: Scheme, factor: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range."""
    if not scheme.symmetric:
        scale = _storable((high - low) / scheme.largest_code, scheme, factor)
        return scale, (-low / scale).round().clamp(0, scheme.largest_code)
    largest = scheme.largest_code / 2 if scheme.number == INT else LARGEST[scheme.number]
    scale = _storable(high / largest, scheme, factor)
    return scale, torch.full_like(scale, middle(scheme))


def _storable(scale: Tensor, scheme: Scheme, factor: float) -> Tensor:
    """Rounded to what the file will hold before any code is chosen; never zero."""
    if scheme.scales == "fp8":
        return (scale / factor).clamp(_SMALLEST_FP8, LARGEST[FP8]).to(torch.float8_e4m3fn).float() * factor
    held = scale.half().float() if scheme.scales == "float16" else scale
    return torch.where(held == 0, SMALLEST_SCALE, held)


def _power_of_two(largest: Tensor, scheme: Scheme) -> Tensor:
    """The exponent that the OCP Microscaling specification gives a group, but rounded up where its largest weight
    would otherwise be cut by more than it is rounded: float32, whole."""
    mantissa, exponent = torch.frexp(largest.clamp(min=2.0**-100))  # largest = mantissa * 2^exponent, from 0.5 to 1
    up = (2 * mantissa >= ROUND_UP_FROM).int()
    return (exponent - 1 + up - int(log2(LARGEST[scheme.number]))).float()
