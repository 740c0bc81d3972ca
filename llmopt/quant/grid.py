"""Scales and zero points: which values the codes of a group stand for."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmopt.backend.select import multiplier
from llmopt.weights.numbers import INT, codes_of, rounded
from llmopt.weights.quantized import QuantizedTensor, Scales
from llmopt.weights.scheme import PER_CHANNEL, Scheme

if TYPE_CHECKING:
    from llmopt.kernels._cpu import Multiplier

SMALLEST_SCALE = 2.0**-24  # float16's smallest number


@dataclass(frozen=True)
class Grid:
    """``value = scale * (number - zero)`` for every number that a code of the scheme stands for.

    Attributes:
        scheme: whose codes these are.
        scales: as the file will hold them, [out, groups].
        zeros: float32 [out, groups] of whole numbers, None where the scheme has no zero points.
        minimums: what code 0 stands for, as the file will hold it; None where the scheme has no minimums.
    """

    scheme: Scheme
    scales: Scales
    zeros: Tensor | None = None
    minimums: Scales | None = None

    @cached_property
    def scale(self) -> Tensor:
        """float32 [out, groups], never 0: a group of scale 0 has one value, whatever its codes."""
        scale = self.scales.float()
        return torch.where(scale == 0, SMALLEST_SCALE, scale)

    @cached_property
    def zero(self) -> Tensor:
        """float32 [out, groups]; of a grid with minimums not whole."""
        if self.minimums is not None:
            return -self.minimums.float() / self.scale
        return self.zeros if self.zeros is not None else torch.full_like(self.scale, middle(self.scheme))

    def numbers(self, weight: Tensor) -> Tensor:
        """The nearest number of each weight [out, groups, n] (or [out, groups] for one column a group), float32."""
        scale, zero = self._like(weight)
        return rounded(torch.addcdiv(zero, weight, scale), self.scheme.number, self.scheme.largest_code)

    def values(self, numbers: Tensor) -> Tensor:
        """What numbers of the same shape stand for, scaled."""
        scale, zero = self._like(numbers)
        return (numbers - zero).mul_(scale)

    def errors(self, weight: Tensor) -> Tensor:
        """What a weight [out, groups, n] becomes less what it was."""
        kernels = self._kernels()
        if kernels is None:
            return self.values(self.numbers(weight)).sub_(weight)
        weight = weight.contiguous()
        errors = torch.empty_like(weight)
        kernels.grid_errors(weight, self.scale, self.zero, None, errors, None, self.scheme.largest_code)
        return errors

    def losses(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        """The squared error [out, groups] of a weight [out, groups, n], each input weighted by `importance` [groups, n]
        where it is given."""
        kernels = self._kernels()
        if kernels is None:
            squares = self.values(self.numbers(weight)).sub_(weight).square_()
            return (squares if importance is None else squares.mul_(importance)).sum(-1)
        losses = torch.empty(weight.shape[:2])
        weight = weight.contiguous()
        kernels.grid_errors(weight, self.scale, self.zero, importance, None, losses, self.scheme.largest_code)
        return losses

    def quantized(self, numbers: Tensor, group_index: Tensor | None = None) -> QuantizedTensor:
        """The canonical form of numbers [out, in] on this grid."""
        return QuantizedTensor(
            codes=codes_of(numbers, self.scheme.number),
            scales=self.scales,
            zeros=None if self.zeros is None else self.zeros.to(torch.uint8),
            group_index=group_index,
            bits=self.scheme.bits,
            activations=self.scheme.activations,
            number=self.scheme.number,
            minimums=self.minimums,
        )

    def _kernels(self) -> "Multiplier | None":
        """Those that round to this grid, where they are there."""
        known = self.scheme.number == INT and self.minimums is None and self.scale.device.type == "cpu"
        return multiplier() if known else None

    def _like(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        return (self.scale, self.zero) if tensor.dim() == 2 else (self.scale[..., None], self.zero[..., None])


def middle(scheme: Scheme) -> float:
    """The zero point of a symmetric scheme."""
    return float(1 << (scheme.bits - 1)) if scheme.number == INT else 0.0


def group_size_of(scheme: Scheme, width: int) -> int:
    """The number of inputs in a group of this scheme for rows of this width."""
    if scheme.group_size is None:
        raise ValueError("the scheme's group size has not been settled; see Scheme.for_widths")
    return width if scheme.group_size == PER_CHANNEL else scheme.group_size


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """[out, in] as [out, groups, group size]."""
    return weight.unflatten(1, (-1, group_size_of(scheme, weight.shape[1])))
