"""Codes of any width as a continuous stream of bits in 32-bit words, lowest bits first.

32 codes of b bits take exactly b words, so every width repeats after 32 codes; a width that does not divide 32 has
codes that straddle two words.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

WORD = 32


def words_for(count: int, bits: int) -> int:
    """How many words so many codes take."""
    return -(-count * bits // WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 [..., n] into int32 [..., ceil(n * bits / 32)]; bits left over in the last word are 0."""
    count = codes.shape[-1]
    periods = pad(codes, (0, -count % WORD)).unflatten(-1, (-1, WORD))
    words = torch.zeros(*periods.shape[:-1], bits, dtype=torch.int64, device=codes.device)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = periods[..., i].long()
        words[..., word] |= code << shift & 0xFFFFFFFF
        if shift + bits > WORD:
            words[..., word + 1] |= code >> (WORD - shift)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).int()  # the same 32 bits, read as signed
    return signed.flatten(-2)[..., : words_for(count, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack int32 [..., ceil(count * bits / 32)] into uint8 [..., count]."""
    periods = pad(words, (0, -words.shape[-1] % bits)).unflatten(-1, (-1, bits)).long() & 0xFFFFFFFF
    codes = torch.empty(*periods.shape[:-1], WORD, dtype=torch.uint8, device=words.device)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = periods[..., word] >> shift
        if shift + bits > WORD:
            code |= periods[..., word + 1] << (WORD - shift)
        codes[..., i] = code & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count].contiguous()
