"""One layer's keys and values in blocks of tokens, in plain torch, and the kinds of numbers that a cache can hold."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.weights.numbers import FP8, LARGEST

CACHE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""The kinds of KV caches, by the names of --kv-cache-dtype."""

_SCALE_BYTES = 4


def bytes_per_token(kind: str, kv_heads: int, head_dim: int) -> int:
    """Bytes that one token's keys and values take in one layer."""
    return 2 * kv_heads * (head_dim * CACHE_DTYPES[kind].itemsize + (_SCALE_BYTES if kind == "int8" else 0))


@dataclass(frozen=True)
class KVCache:
    """One layer's cache.

    Attributes:
        keys, values: [blocks, block_size, kv_heads, head_dim], in one of CACHE_DTYPES. fp8 is e4m3 without a scale:
            larger numbers than 448 become 448.
        key_scales, value_scales: of int8, float32 [blocks, block_size, kv_heads]: a number is its code times the scale
            of its token and head, which is the largest magnitude / 127. Else None.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @classmethod
    def allocate(
        cls, kind: str, blocks: int, block_size: int, kv_heads: int, head_dim: int, device: torch.device
    ) -> "KVCache":
        """An empty cache, its memory touched so that running out happens here and not under load."""
        shape = (blocks, block_size, kv_heads, head_dim)
        # zero_ rather than torch.zeros: the latter leaves the pages untouched.
        numbers = [torch.empty(shape, dtype=CACHE_DTYPES[kind], device=device).zero_() for _ in range(2)]
        if kind != "int8":
            return cls(*numbers)
        return cls(*numbers, *(torch.empty(shape[:3], device=device).zero_() for _ in range(2)))

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Round keys and values [T, kv_heads, head_dim] and put them into slots, int64 [T]."""
        _put(self.keys, self.key_scales, slots, keys)
        _put(self.values, self.value_scales, slots, values)

    def read(self, tables: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of blocks, int64 [..., n], in `dtype`: each [..., n * block_size, kv_heads, head_dim]."""
        return _get(self.keys, self.key_scales, tables, dtype), _get(self.values, self.value_scales, tables, dtype)


def _put(cache: Tensor, scales: Tensor | None, slots: Tensor, numbers: Tensor) -> None:
    if scales is not None:
        largest = numbers.abs().amax(-1).float()
        own = torch.where(largest == 0, 1.0, largest / 127)  # an all-zero row stays zero
        numbers = (numbers.float() / own[..., None]).round_()
        scales.flatten(0, 1).index_copy_(0, slots, own)
    elif cache.dtype == torch.float8_e4m3fn:
        numbers = numbers.clamp(-LARGEST[FP8], LARGEST[FP8])
    _bits(cache).flatten(0, 1).index_copy_(0, slots, _bits(numbers.to(cache.dtype)))


def _get(cache: Tensor, scales: Tensor | None, tables: Tensor, dtype: torch.dtype) -> Tensor:
    numbers = _bits(cache)[tables].view(cache.dtype)
    if scales is not None:
        numbers = numbers.float() * scales[tables][..., None]
    return numbers.to(dtype).flatten(-4, -3)


def _bits(numbers: Tensor) -> Tensor:
    """8-bit floats as bytes, because torch does not move them about; all else as it is."""
    return numbers.view(torch.uint8) if numbers.dtype == torch.float8_e4m3fn else numbers
