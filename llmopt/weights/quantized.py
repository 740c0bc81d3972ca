"""The one canonical form of a quantized weight, between every method, format and kernel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmopt.weights.numbers import INT, values_of

ELEMENTS_AT_ONCE = 1 << 22  # of a weight that are in float32 together: all of an embedding may be more than fits


@dataclass(frozen=True)
class TwoLevel:
    """Numbers [rows, groups] stored in a few bits each, times factors that runs of groups share.

    Attributes:
        values: [rows, groups], of any dtype.
        factors: floating point [rows or 1, runs], where runs divides groups.
    """

    values: Tensor
    factors: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def float(self) -> Tensor:
        """float32 [rows, groups]."""
        runs = self.factors.shape[1]
        return (self.values.float().unflatten(1, (runs, -1)) * self.factors.float()[..., None]).flatten(1)

    def __getitem__(self, rows: Tensor | slice) -> "TwoLevel":
        return TwoLevel(self.values[rows], self.factors if self.factors.shape[0] == 1 else self.factors[rows])


Scales = Tensor | TwoLevel


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight matrix [out, in] in codes: ``w[o, i] = scales[o, g] * (value(codes[o, i]) - zeros[o, g])``, or with
    minimums ``w[o, i] = scales[o, g] * codes[o, i] + minimums[o, g]``.

    ``g`` is the group of input ``i``: ``group_index[i]``, or ``i // group_size`` where there is no index. The value of
    a code is the code itself, but for the floating-point kinds of number.

    Attributes:
        codes: uint8 [out, in], each in 0 .. 2**bits - 1, one code a byte.
        scales: floating point [out, groups], or in two levels.
        zeros: uint8 [out, groups], or None: then every zero point of integer codes without minimums is the middle
            code, 2**(bits - 1), and that of floating-point codes is 0.
        group_index: int32 [in], or None where groups are runs of equal length.
        bits: width of a code, 2 to 8.
        activations: `int8` or `fp8` where the scheme also rounds activations, per token, symmetric; else None.
        number: `int`, `fp4` or `fp8`, the kind of number that a code stands for.
        minimums: what code 0 stands for, floating point [out, groups] or in two levels; None where there are none.
    """

    codes: Tensor
    scales: Scales
    zeros: Tensor | None
    group_index: Tensor | None
    bits: int
    activations: str | None = None
    number: str = INT
    minimums: Scales | None = None

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        groups = self.scales.shape[1]
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes are {self.codes.dtype}, not uint8")
        if self.scales.shape[0] != out_features:
            raise ValueError(f"{self.scales.shape[0]} rows of scales for {out_features} rows of codes")
        for name, others in (("zeros", self.zeros), ("minimums", self.minimums)):
            if others is not None and others.shape != self.scales.shape:
                raise ValueError(f"{name} are {tuple(others.shape)}, scales {tuple(self.scales.shape)}")
        if self.zeros is not None and (self.minimums is not None or self.number != INT):
            raise ValueError("zero points go with integer codes that have no minimums")
        if self.group_index is None and in_features % groups:
            raise ValueError(f"{groups} groups do not divide {in_features} inputs")
        if self.group_index is not None and self.group_index.shape != (in_features,):
            raise ValueError(f"group index of {tuple(self.group_index.shape)} for {in_features} inputs")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Inputs a group; exact where there is no group index, else the mean rounded up."""
        return -(-self.codes.shape[1] // self.scales.shape[1])

    @property
    def middle(self) -> int:
        """The zero point of a symmetric code."""
        return 1 << (self.bits - 1)

    @property
    def is_symmetric(self) -> bool:
        return self.zeros is None and self.minimums is None

    def groups(self) -> Tensor:
        """int64 [in]: the group of each input."""
        if self.group_index is not None:
            return self.group_index.long()
        return torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in floating point, [out, in]; computed in float32, some rows at a time, and rounded to `dtype`."""
        result = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for rows in row_parts(self):
            result[rows] = self.select_rows(rows)._in_float32()
        return result

    def _in_float32(self) -> Tensor:
        columns: slice | Tensor = slice(None)
        if self.group_index is None:
            values = values_of(self.codes, self.number).unflatten(1, (self.scales.shape[1], self.group_size))
        else:
            columns = self.groups()
            values = values_of(self.codes, self.number)[..., None]
        scales = self.scales.float()[:, columns, None]
        if self.minimums is not None:
            return values.mul_(scales).add_(self.minimums.float()[:, columns, None]).flatten(1)
        if self.zeros is not None:
            values -= self.zeros[:, columns, None]
        elif self.number == INT:
            values -= self.middle
        return values.mul_(scales).flatten(1)

    def select_rows(self, rows: Tensor | slice) -> "QuantizedTensor":
        """The outputs of these row numbers (int64), in that order; a slice copies nothing."""
        zeros = None if self.zeros is None else self.zeros[rows]
        minimums = None if self.minimums is None else self.minimums[rows]
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=zeros, minimums=minimums)

    def plain_order(self) -> "QuantizedTensor":
        """The same tensor without a group index where that index only says what the default says."""
        if self.group_index is None or self.codes.shape[1] % self.scales.shape[1]:
            return self
        default = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size
        return replace(self, group_index=None) if torch.equal(self.group_index.long(), default) else self


Weight = Tensor | QuantizedTensor


def joined(weights: Sequence[Weight]) -> Weight:
    """Weights with the same inputs as one, outputs side by side. Raises ValueError where they are not of one kind.

    What they share, such as the group index, is that of the first.
    """
    first, *others = weights
    if not others:
        return first
    if isinstance(first, Tensor):
        return torch.cat([weight for weight in weights if isinstance(weight, Tensor)])
    quantized = [weight for weight in weights if isinstance(weight, QuantizedTensor)]
    if len(quantized) < len(weights) or any(_kind(weight) != _kind(first) for weight in quantized):
        raise ValueError("weights in different numbers cannot be joined")
    if any(not _same_groups(weight, first) for weight in quantized):
        raise ValueError("weights whose inputs are grouped differently cannot be joined")
    return replace(
        first,
        codes=torch.cat([weight.codes for weight in quantized]),
        scales=_joined_scales([weight.scales for weight in quantized]),
        zeros=None if first.zeros is None else torch.cat([weight.zeros for weight in quantized]),  # type: ignore[misc]
        minimums=None if first.minimums is None else _joined_scales([weight.minimums for weight in quantized]),  # type: ignore[misc]
    )


def _kind(weight: QuantizedTensor) -> tuple[object, ...]:
    levels = isinstance(weight.scales, TwoLevel) and weight.scales.factors.shape
    return weight.bits, weight.number, weight.activations, weight.zeros is None, weight.minimums is None, levels


def _same_groups(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    if a.group_index is None or b.group_index is None:
        return a.group_index is b.group_index and a.scales.shape[1] == b.scales.shape[1]
    return torch.equal(a.group_index, b.group_index)


def _joined_scales(scales: Sequence[Scales]) -> Scales:
    if all(isinstance(each, Tensor) for each in scales):
        return torch.cat([each for each in scales if isinstance(each, Tensor)])
    levels = [each for each in scales if isinstance(each, TwoLevel)]
    values = torch.cat([each.values for each in levels])
    first = levels[0].factors
    if all(each.factors.shape[0] == 1 and torch.equal(each.factors, first) for each in levels):
        return TwoLevel(values, first)
    return TwoLevel(values, torch.cat([each.factors.expand(each.shape[0], -1) for each in levels]))


def row_parts(weight: Weight) -> Iterator[slice]:
    """Runs of rows of a matrix, of a size that may be in float32 whatever the size of the matrix."""
    step = max(1, ELEMENTS_AT_ONCE // max(1, weight.shape[1]))
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))
