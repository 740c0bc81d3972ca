"""The one door to the kernels: what the model asks of a backend, and the data that crosses.

`reference` implements all of it in plain torch and is the truth that the others are tested against. Another backend
overrides what it does faster; what it cannot do goes to `reference` with one warning that names the reason.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.backend.kv_cache import KVCache
from llmopt.backend.sampling import SamplingBatch
from llmopt.weights.quantized import Weight


@dataclass(frozen=True)
class PagedBatch:
    """Where the tokens of one step stand in the paged KV cache. S sequences, T tokens in all, oldest first.

    Attributes:
        query_starts: S + 1 offsets into the T tokens; sequence s has the tokens query_starts[s] to query_starts[s+1].
        context_lens: int32 [S], tokens of each sequence in the cache once this step's are written.
        block_tables: int32 [S, widest table], block numbers, padded with zeros.
        slots: int64 [T], the cache slot (block * block_size + offset) each token's key and value go to.
        positions: int64 [T], each token's position in its sequence.
    """

    query_starts: list[int]
    context_lens: Tensor
    block_tables: Tensor
    slots: Tensor
    positions: Tensor


class Linear(ABC):
    """A packed weight. Calling it multiplies: [T, in] to [T, out], in the dtype of its input."""

    in_features: int
    out_features: int

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LayerParts:
    """What a decoder layer holds, as the backend packed and placed it. Norms are [hidden]; those of queries and keys
    [head_dim], or None. `window`: see `Backend.attend`."""

    input_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


@dataclass(frozen=True)
class DecoderParts:
    """A whole decoder: what `Backend.fuse` takes. `frequencies` are radians a position, float32 [rotated / 2]."""

    layers: list[LayerParts]
    embedding: Tensor
    norm: Tensor
    head: Linear
    frequencies: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


class FusedDecoder(ABC):
    """All layers of a step in one call, with a KV cache of its own."""

    @abstractmethod
    def hidden(self, tokens: Tensor, batch: PagedBatch) -> Tensor:
        """The normed last hidden states, float32 [T, hidden], of tokens int64 [T]."""

    @abstractmethod
    def logits(self, tokens: Tensor, batch: PagedBatch, rows: Tensor) -> Tensor:
        """float32 [n, vocabulary] for the tokens at `rows`, int64 [n], ascending, of the T."""


class Backend(ABC):
    """The operations of a decoder on one device. Stateless but for its settings."""

    name: str
    device: torch.device
    dtype: torch.dtype  # of activations

    @property
    def cache_kind(self) -> str:
        """What keys and values are held in where nobody asks for another kind of cache."""
        return str(self.dtype).removeprefix("torch.")

    @abstractmethod
    def pack(self, weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> Linear:
        """One linear operation whose output is that of these weights side by side ([q | k | v], [gate | up]).

        Weights are [out, in] with one `in` for all; a bias is [out] or None.
        """

    @abstractmethod
    def embedding(self, table: Weight) -> Tensor:
        """Place an embedding table [vocabulary, hidden] on the device, in the floating-point dtype that the backend
        looks tokens up in."""

    @abstractmethod
    def kv_cache(self, kind: str, blocks: int, block_size: int, kv_heads: int, head_dim: int) -> KVCache:
        """Allocate one layer's cache of one of CACHE_DTYPES."""

    def fuse(self, parts: DecoderParts, blocks: int, block_size: int, cache_dtype: str) -> FusedDecoder | None:
        """One operation for a whole decoder, where the backend has one for all that it holds; None where not.

        `cache_dtype` is auto, or what the keys and values are held in.
        """
        return None

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    @abstractmethod
    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x [T, heads, head_dim] by the angles of cos, sin [T, rotated / 2]; halves paired as Llama's
        Hugging Face checkpoints have them (Su et al. 2021, arXiv:2104.09864)."""

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) · up for gate_up = [gate | up], [T, 2n] to [T, n]."""

    @abstractmethod
    def write_kv(self, cache: KVCache, keys: Tensor, values: Tensor, batch: PagedBatch) -> None:
        """Put keys and values [T, kv_heads, head_dim] into the slots of the batch."""

    @abstractmethod
    def attend(self, queries: Tensor, cache: KVCache, batch: PagedBatch, scale: float, window: int | None) -> Tensor:
        """Causal attention of queries [T, heads, head_dim] over the cache; returns the same shape.

        Query heads share key heads in equal runs (grouped queries). With a window of w, a token sees itself and
        the w - 1 before it.
        """

    @abstractmethod
    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Choose a token for each row of float32 logits [R, vocabulary], which are overwritten: int64 [R].

        `reference_sampling` says what is chosen. A row's token depends on its own logits and settings alone.
        """
