"""The small integers by which the groups of a K-quant's block are scaled, as ggml packs them into bytes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.errors import LlmoptError


@dataclass(frozen=True)
class ScalePacking:
    """One way of packing.

    Attributes:
        nbytes: bytes of a block.
        lowest, highest: of the numbers that it holds.
        pack: the groups' scales [out, blocks, groups], and their minimums where the type has them, to uint8 [out,
            blocks, nbytes]. Raises LlmoptError for numbers out of range.
        unpack: the inverse; uint8, or int8 where numbers may be negative.
    """

    nbytes: int
    lowest: int
    highest: int
    to_bytes: Callable[..., Tensor]
    unpack: Callable[[Tensor], tuple[Tensor, ...]]

    def pack(self, *numbers: Tensor) -> Tensor:
        for part in numbers:
            low, high = int(part.min()), int(part.max())
            if low < self.lowest or high > self.highest:
                raise LlmoptError(
                    f"GGUF blocks: scales from {low} to {high} do not fit, only {self.lowest} to {self.highest} do"
                )
        return self.to_bytes(*numbers)


def _pack_nibbles(scales: Tensor, minimums: Tensor) -> Tensor:
    return scales | minimums << 4


def _unpack_nibbles(packed: Tensor) -> tuple[Tensor, ...]:
    return packed & 15, packed >> 4


def _pack_sixes(scales: Tensor, minimums: Tensor) -> Tensor:
    """8 and 8 of 6 bits. The first four of each have a byte, whose free bits take the others' highest two."""
    first, others = _quarters(scales, minimums)
    low = others & 15
    return torch.cat((first | (others >> 4) << 6, low[..., :4] | low[..., 4:] << 4), dim=2)


def _unpack_sixes(packed: Tensor) -> tuple[Tensor, ...]:
    """The bytes of a block are three words: two of the first four numbers of each, one of the others' lowest bits."""
    one, other, low = packed.clone(memory_format=torch.contiguous_format).view(torch.int32).unbind(2)
    scales = one & 0x3F3F3F3F, low & 0x0F0F0F0F | one >> 2 & 0x30303030
    minimums = other & 0x3F3F3F3F, low >> 4 & 0x0F0F0F0F | other >> 2 & 0x30303030
    return torch.stack(scales, dim=2).view(torch.uint8), torch.stack(minimums, dim=2).view(torch.uint8)


def _quarters(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The first halves of both, and the second halves of both."""
    return torch.cat((one[..., :4], other[..., :4]), dim=2), torch.cat((one[..., 4:], other[..., 4:]), dim=2)


def _pack_signed_sixes(scales: Tensor) -> Tensor:
    """16 of 6 bits, 32 above what they mean: their lowest four bits in 8 bytes, then their highest two in 4."""
    codes = (scales + 32).view(torch.uint8)
    low, high = codes & 15, (codes >> 4).unflatten(2, (4, 4))
    high = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    return torch.cat((low[..., :8] | low[..., 8:] << 4, high), dim=2)


def _unpack_signed_sixes(packed: Tensor) -> tuple[Tensor, ...]:
    low, high = packed[..., :8], packed[..., 8:]
    codes = torch.cat((low & 15, low >> 4), dim=2)
    codes |= torch.cat([(high >> shift & 3) << 4 for shift in (0, 2, 4, 6)], dim=2)
    return (codes.view(torch.int8) - 32,)


def _pack_bytes(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8)


def _unpack_bytes(packed: Tensor) -> tuple[Tensor, ...]:
    return (packed.clone().view(torch.int8),)


K_SCALES = {
    "nibbles": ScalePacking(16, 0, 15, _pack_nibbles, _unpack_nibbles),
    "sixes": ScalePacking(12, 0, 63, _pack_sixes, _unpack_sixes),
    "signed sixes": ScalePacking(12, -32, 31, _pack_signed_sixes, _unpack_signed_sixes),
    "bytes": ScalePacking(16, -128, 127, _pack_bytes, _unpack_bytes),
}
"""The ways by name."""
