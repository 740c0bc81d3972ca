"""Rotation angles (Su et al. 2021, arXiv:2104.09864), with the stretched variants that `config.Rope` describes."""

import math

import torch
from torch import Tensor

from llmopt.model.config import Rope


def divisors(rope: Rope, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: what each frequency is divided by; all ones without scaling."""
    frequencies = _base_frequencies(rope, head_dim)
    if rope.kind == "default":
        return torch.ones_like(frequencies)
    if rope.kind == "linear":
        return torch.full_like(frequencies, rope.factor)
    turns = rope.original_max_position * frequencies / (2 * math.pi)  # rotations over the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return 1 / ((1 - smooth) / rope.factor + smooth)


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: radians a position."""
    return _base_frequencies(rope, head_dim) / divisors(rope, head_dim)


def angles(positions: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [T, head_dim / 2], of positions [T]."""
    angle = positions.float()[:, None] * inverse_frequencies[None, :]
    return angle.cos(), angle.sin()


def _base_frequencies(rope: Rope, head_dim: int) -> Tensor:
    return rope.theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
