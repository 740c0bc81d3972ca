"""xᵀ x of many rows, as calibration gathers it."""

from collections.abc import Callable

import torch
from torch import Tensor

from llmopt.backend.select import multiplier

BLOCK = 512  # columns that are computed together

GramSum = Callable[[Tensor, Tensor], None]


def add_gram(gram: Tensor, x: Tensor) -> None:
    """Add xᵀ x, of float32 x [rows, width], to the symmetric float32 [width, width].

    The blocks on and above the diagonal are computed; what is below it is their mirror image, within a block too, since
    libraries may round the two halves of a product differently.
    """
    width = x.shape[1]
    if x.device != gram.device:
        gram += (x.T @ x).to(gram.device)
        return
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        gram[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        gram[stop:, start:stop] = gram[start:stop, stop:].T
        block = gram[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)


def fast_gram(device: str, products: torch.dtype) -> GramSum:
    """`add_gram` for rows that meet their weights in the dtype `products`: where that is bfloat16, the compiled kernel
    rounds them in the same way and takes a third of the time."""
    kernels = multiplier() if device == "cpu" and products == torch.bfloat16 else None
    if kernels is None:
        return add_gram
    return lambda gram, x: kernels.add_gram(gram, x.contiguous())
