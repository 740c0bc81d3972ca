"""Rotation angles (Su et al. 2021, arXiv:2104.09864), with the stretched variants that `config.Rope` describes."""

import math

import torch
from torch import Tensor

from llmopt.model.config import Rope


def divisors(rope: Rope, head_dim: int, length: int | None = None) -> Tensor:
    """float32 [rotated / 2]: what each frequency is divided by; all ones without scaling.

    Longrope's depend on the longest sequence that there will be, in tokens; None stands for a long one.
    """
    if rope.kind == "longrope":
        short = length is not None and length <= rope.original_max_position
        return torch.tensor(rope.short_factors if short else rope.long_factors)
    frequencies = _base_frequencies(rope, head_dim)
    if rope.kind == "default":
        return torch.ones_like(frequencies)
    if rope.kind == "linear":
        return torch.full_like(frequencies, rope.factor)
    turns = rope.original_max_position * frequencies / (2 * math.pi)  # rotations over the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return 1 / ((1 - smooth) / rope.factor + smooth)


def frequencies(rope: Rope, head_dim: int, length: int | None = None) -> Tensor:
    """float32 [rotated / 2]: radians a position; for `length` see `divisors`."""
    return _base_frequencies(rope, head_dim) / divisors(rope, head_dim, length)


def angles(positions: Tensor, inverse_frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [T, rotated / 2], of positions [T], times a factor (`Rope.attention_factor`)."""
    angle = positions.float()[:, None] * inverse_frequencies[None, :]
    return angle.cos().mul_(factor), angle.sin().mul_(factor)


def _base_frequencies(rope: Rope, head_dim: int) -> Tensor:
    rotated = rope.rotated(head_dim)
    return rope.theta ** (-torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
