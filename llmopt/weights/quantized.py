"""The one canonical form of a quantized weight, between every method, format and kernel."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight matrix [out, in] in integer codes: ``w[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g])``.

    ``g`` is the group of input ``i``: ``group_index[i]``, or ``i // group_size`` where there is no index.

    Attributes:
        codes: uint8 [out, in], each in 0 .. 2**bits - 1, one code a byte.
        scales: floating point [out, groups].
        zeros: uint8 [out, groups], or None where every zero point is the middle code, 2**(bits - 1).
        group_index: int32 [in], or None where groups are runs of equal length.
        bits: width of a code, 2 to 8.
        activation_bits: 8 where the scheme also rounds activations, per token, symmetric; else None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_index: Tensor | None
    bits: int
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        groups = self.scales.shape[1]
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes are {self.codes.dtype}, not uint8")
        if self.scales.shape[0] != out_features:
            raise ValueError(f"{self.scales.shape[0]} rows of scales for {out_features} rows of codes")
        if self.zeros is not None and self.zeros.shape != self.scales.shape:
            raise ValueError(f"zeros are {tuple(self.zeros.shape)}, scales {tuple(self.scales.shape)}")
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

    def groups(self) -> Tensor:
        """int64 [in]: the group of each input."""
        if self.group_index is not None:
            return self.group_index.long()
        return torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in floating point, [out, in]; computed in float32 and then rounded to `dtype`."""
        scales = self.scales.float()
        zeros = self.zeros.float() if self.zeros is not None else torch.full_like(scales, self.middle)
        if self.group_index is None:
            grouped = self.codes.float().unflatten(1, (scales.shape[1], self.group_size))
            return ((grouped - zeros[..., None]) * scales[..., None]).flatten(1).to(dtype)
        groups = self.groups()
        return ((self.codes.float() - zeros[:, groups]) * scales[:, groups]).to(dtype)

    def select_rows(self, rows: Tensor) -> "QuantizedTensor":
        """The outputs of these row numbers (int64), in that order."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=zeros)

    def plain_order(self) -> "QuantizedTensor":
        """The same tensor without a group index where that index only says what the default says."""
        if self.group_index is None or self.codes.shape[1] % self.scales.shape[1]:
            return self
        default = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size
        return replace(self, group_index=None) if torch.equal(self.group_index.long(), default) else self


Weight = Tensor | QuantizedTensor
