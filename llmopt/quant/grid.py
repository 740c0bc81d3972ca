"""Scales and zero points: which values the codes of a group stand for."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.weights.scheme import PER_CHANNEL, Scheme

SMALLEST_SCALE = 2.0**-24  # float16's smallest number, in which formats store scales
_ELEMENTS_AT_ONCE = 1 << 22  # keeps the search's temporaries in the cache and its memory small


@dataclass(frozen=True)
class Grid:
    """``value = scale * (code - zero)``; scale and zero are float32 [out, groups], zero holds whole numbers."""

    scale: Tensor
    zero: Tensor
    largest_code: int

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest code of each weight [out, groups, n] (or [out, groups] for one column a group), float32."""
        scale, zero = self._like(weight)
        return (weight / scale + zero).round().clamp(0, self.largest_code)

    def values(self, codes: Tensor) -> Tensor:
        """What codes of the same shape stand for."""
        scale, zero = self._like(codes)
        return (codes - zero) * scale

    def select(self, groups: Tensor | slice) -> "Grid":
        """The grid of some groups."""
        return Grid(self.scale[:, groups], self.zero[:, groups], self.largest_code)

    def _like(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        return (self.scale, self.zero) if tensor.dim() == 2 else (self.scale[..., None], self.zero[..., None])


def group_size_of(scheme: Scheme, width: int) -> int:
    """The number of inputs in a group of this scheme for rows of this width."""
    if scheme.group_size is None:
        raise ValueError("the scheme's group size has not been settled; see Scheme.for_widths")
    return width if scheme.group_size == PER_CHANNEL else scheme.group_size


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """[out, in] as [out, groups, group size]."""
    return weight.unflatten(1, (-1, group_size_of(scheme, weight.shape[1])))


def fit_grid(weight: Tensor, scheme: Scheme, importance: Tensor | None = None, steps: int = 1) -> Grid:
    """The grid for each group of a weight [out, groups, group size], float32.

    With one step the range of the group is covered exactly. With more, the range is shrunk in that many steps down
    to a half, and the step with the least squared error is taken, each input weighted by `importance` [groups, group
    size] (the mean square of that input) where it is given.
    """
    if steps == 1:
        return Grid(*_cover(weight, scheme, shrink=1), (1 << scheme.bits) - 1)
    rows = max(1, _ELEMENTS_AT_ONCE // weight[0].numel())
    parts = [_fit_rows(part, scheme, importance, steps) for part in weight.split(rows)]
    scale, zero = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Grid(scale, zero, (1 << scheme.bits) - 1)


def best_of(candidates: Iterable[tuple[Grid, Tensor]]) -> Grid:
    """For each group the grid of the least loss [out, groups] among candidates; the first of equals."""
    (best, least), *others = candidates
    for grid, loss in others:
        better = loss < least
        least = torch.where(better, loss, least)
        scale, zero = torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero)
        best = Grid(scale, zero, best.largest_code)
    return best


def _fit_rows(weight: Tensor, scheme: Scheme, importance: Tensor | None, steps: int) -> tuple[Tensor, Tensor]:
    largest_code = (1 << scheme.bits) - 1
    candidates = []
    for step in range(steps):
        grid = Grid(*_cover(weight, scheme, shrink=1 - 0.5 * step / steps), largest_code)
        error = (grid.values(grid.codes(weight)) - weight).square()
        candidates.append((grid, (error if importance is None else error * importance).sum(-1)))
    best = best_of(candidates)
    return best.scale, best.zero


def _cover(weight: Tensor, scheme: Scheme, shrink: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose range is that of the weights, shrunk."""
    largest_code = (1 << scheme.bits) - 1
    if not scheme.symmetric:
        low, high = weight.amin(-1).clamp(max=0) * shrink, weight.amax(-1).clamp(min=0) * shrink
        scale = _storable((high - low) / largest_code)
        return scale, (-low / scale).round().clamp(0, largest_code)
    middle = float(1 << (scheme.bits - 1))
    if scheme.signed_scale:
        extreme = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))[..., 0]
        scale = _storable(extreme * shrink / -middle)
    else:
        scale = _storable(weight.abs().amax(-1) * shrink / (largest_code / 2))
    return scale, torch.full_like(scale, middle)


def _storable(scale: Tensor) -> Tensor:
    """Rounded to float16 before any code is chosen, since that is what the file will hold; never zero."""
    rounded = scale.half().float()
    return torch.where(rounded == 0, SMALLEST_SCALE, rounded)
