"""One layer's keys and values in the layout of the compiled attention (kernels/README.md, "Attention over a paged
cache")."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.backend.kv_cache import CACHE_DTYPES
from llmopt.errors import InputError
from llmopt.kernels._cpu import LayerCache

DTYPES = {kind: CACHE_DTYPES[kind] for kind in ("bfloat16", "int8", "fp8")}
STEP = 16  # the kernels take 16 keys at a time, and 16 channels
MOST_CHANNELS = 256


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of one layer, in blocks of tokens.

    Attributes:
        keys: bfloat16, int8 or float8_e4m3fn [blocks, kv_heads, head_dim / 2, block_size, 2]: two neighbouring channels
            of a token stand together, then the same channels of the next token.
        values: likewise [blocks, kv_heads, block_size / 2, head_dim, 2]: one channel of two neighbouring tokens.
        key_scales: of int8, float32 [blocks, kv_heads, block_size]; a number is its code times its scale. Else None.
        value_scales: likewise.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @classmethod
    def allocate(cls, kind: str, blocks: int, block_size: int, kv_heads: int, head_dim: int) -> "PagedCache":
        """An empty cache, its memory touched so that running out happens here and not under load.

        Raises InputError for a kind or a shape that the kernels do not have.
        """
        dtype = _checked_dtype(kind, block_size, head_dim)
        shapes = ((blocks, kv_heads, head_dim // 2, block_size, 2), (blocks, kv_heads, block_size // 2, head_dim, 2))
        # zero_ rather than torch.zeros: the latter leaves the pages untouched.
        keys, values = (torch.empty(shape, dtype=dtype).zero_() for shape in shapes)
        if kind != "int8":
            return cls(keys, values)
        scales = (torch.empty(blocks, kv_heads, block_size).zero_() for _ in range(2))
        return cls(keys, values, *scales)

    @property
    def kind(self) -> str:
        return next(kind for kind, dtype in DTYPES.items() if dtype == self.keys.dtype)

    def layer(self) -> LayerCache:
        """Its addresses, for the kernels; valid for as long as this cache lives."""
        scales = [0 if scales is None else scales.data_ptr() for scales in (self.key_scales, self.value_scales)]
        return LayerCache(self.keys.data_ptr(), self.values.data_ptr(), *scales)

    def dequantized(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of these blocks (int [n]), each float32 [n * block_size, kv_heads, head_dim]."""
        keys = self.keys[blocks].float().permute(0, 3, 1, 2, 4).flatten(3)
        values = self.values[blocks].float().permute(0, 2, 4, 1, 3).flatten(1, 2)
        if self.key_scales is not None and self.value_scales is not None:
            keys *= self.key_scales[blocks].transpose(1, 2)[..., None]
            values *= self.value_scales[blocks].transpose(1, 2)[..., None]
        return keys.flatten(0, 1), values.flatten(0, 1)


def _checked_dtype(kind: str, block_size: int, head_dim: int) -> torch.dtype:
    if kind not in DTYPES:
        raise InputError(f"unknown kind of KV cache {kind!r}; known: {', '.join(DTYPES)}")
    if block_size < STEP or block_size % STEP:
        raise InputError(f"the block size of a {kind} KV cache on CPUs must be a multiple of {STEP}, not {block_size}")
    if head_dim < STEP or head_dim % STEP or head_dim > MOST_CHANNELS:
        raise InputError(
            f"the head size must be a multiple of {STEP}, at most {MOST_CHANNELS}, for a {kind} KV cache on CPUs; "
            f"this model's is {head_dim}"
        )
    return DTYPES[kind]
