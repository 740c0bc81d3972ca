"""Codes of any width as a continuous stream of bits in 32-bit words, lowest bits first.

A width that divides 32 fills each word with whole codes. Any other has codes that straddle two words, and its pattern
repeats after as many words as the width has bits once common factors with 32 are gone: 3-bit codes after 3 words.
"""

from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

WORD = 32
_WIDE = {1: torch.int64, 2: torch.int32, 4: torch.int16}  # as many bytes as a byte has codes of so many bits


def words_for(count: int, bits: int) -> int:
    """How many words so many codes take."""
    return -(-count * bits // WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 [..., n] into int32 [..., ceil(n * bits / 32)]; bits left over in the last word are 0."""
    period, width = _pattern(bits)
    repeats = pad(codes, (0, -codes.shape[-1] % period)).unflatten(-1, (-1, period))
    words = torch.zeros(*repeats.shape[:-1], width, dtype=torch.int32, device=codes.device)
    for i in range(period):
        word, shift = divmod(i * bits, WORD)
        code = repeats[..., i].int()
        words[..., word] |= code << shift  # what does not fit falls off the upper end
        if shift + bits > WORD:
            words[..., word + 1] |= code >> (WORD - shift)
    return words.flatten(-2)[..., : words_for(codes.shape[-1], bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack int32 [..., ceil(count * bits / 32)] into uint8 [..., count]."""
    codes = _unpack_straddling(words, bits) if 8 % bits else spread(words.contiguous().view(torch.uint8), bits)
    return codes[..., :count].contiguous()


def spread(packed: Tensor, bits: int) -> Tensor:
    """The codes of 1, 2, 4 or 8 bits in each byte, lowest first: uint8 [..., n] to uint8 [..., n * 8 / bits].

    A byte becomes a number as wide as its codes will be, which is pulled apart half by half in whole registers.
    """
    if bits == 8:
        return packed
    wide = packed.to(_WIDE[bits])
    distance, width = 64 // bits, 8
    while width > bits:
        distance, width = distance // 2, width // 2
        mask = sum(((1 << width) - 1) << at for at in range(0, 64 // bits, distance))
        wide |= wide << (distance - width)
        wide &= mask
    return wide.view(torch.uint8)


def _unpack_straddling(words: Tensor, bits: int) -> Tensor:
    """As `unpack`, for widths whose codes may straddle two words, with what is left over at the end."""
    period, width = _pattern(bits)
    repeats = pad(words, (0, -words.shape[-1] % width)).unflatten(-1, (-1, width))
    codes = torch.empty(*repeats.shape[:-1], period, dtype=torch.uint8, device=words.device)
    for i in range(period):
        word, shift = divmod(i * bits, WORD)
        code = repeats[..., word] >> shift & ((1 << min(bits, WORD - shift)) - 1)  # the mask drops copies of the sign
        if shift + bits > WORD:
            code |= repeats[..., word + 1] << (WORD - shift) & ((1 << bits) - 1)
        codes[..., i] = code
    return codes.flatten(-2)


def _pattern(bits: int) -> tuple[int, int]:
    """After how many codes, and how many words, codes and words begin together again."""
    common = gcd(bits, WORD)
    return WORD // common, bits // common
