"""What a code stands for before it is scaled: an integer, or a floating-point number of 4 or 8 bits.

FP8 is E4M3 in its finite variant (Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433); FP4 is
E2M1 of the OCP Microscaling Formats specification 1.0.
"""

from functools import cache

import torch
from torch import Tensor

INT, FP4, FP8 = "int", "fp4", "fp8"
LARGEST = {FP4: 6.0, FP8: 448.0}
"""The largest number of each floating-point kind."""

_ELEMENTS_AT_ONCE = 1 << 22
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def values_of(codes: Tensor, number: str) -> Tensor:
    """uint8 codes of any shape as the float32 numbers that they stand for; FP4 is sign · 8 + index, FP8 its bits."""
    if number == INT:
        return codes.float()
    if number == FP8:
        return codes.view(torch.float8_e4m3fn).float()
    return _fp4_table(codes.device)[codes.int()]


def codes_of(values: Tensor, number: str) -> Tensor:
    """The uint8 codes of float32 numbers that `rounded` has made representable."""
    if number == INT:
        return values.to(torch.uint8)
    if number == FP8:
        return values.to(torch.float8_e4m3fn).view(torch.uint8)
    magnitude = torch.bucketize(values.abs().contiguous(), _fp4_table(values.device)[:8]).to(torch.uint8)
    return magnitude | torch.signbit(values).to(torch.uint8) << 3


def rounded(values: Tensor, number: str, largest_code: int) -> Tensor:
    """float32 values rounded, in place, to the nearest number that has a code; ties go to even."""
    if number == INT:
        return values.round_().clamp_(0, largest_code)
    if number == FP8:
        return values.copy_(values.clamp_(-LARGEST[FP8], LARGEST[FP8]).to(torch.float8_e4m3fn))
    # Steps of E2M1: 0.5 below 2, 1 from 2 to 4, 2 from there on.
    step = torch.where(values.abs() < 2, 0.5, torch.where(values.abs() < 4, 1.0, 2.0))
    return values.div_(step).round_().mul_(step).clamp_(-LARGEST[FP4], LARGEST[FP4])


def all_finite(tensor: Tensor) -> bool:
    """Whether floating-point numbers are neither infinite nor NaN; looked at in parts, for large ones."""
    parts = tensor.flatten().split(_ELEMENTS_AT_ONCE)
    # torch cannot ask 8-bit floats whether they are finite.
    return all(bool(torch.isfinite(part if part.itemsize > 1 else part.float()).all()) for part in parts)


@cache
def _fp4_table(device: torch.device) -> Tensor:
    return torch.tensor([*_FP4_VALUES, *(-value for value in _FP4_VALUES)], device=device)
