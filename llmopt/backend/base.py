"""The one door to the kernels: what the model asks of a backend, and the data that crosses.

`reference` implements all of it in plain torch and is the truth that the others are tested against. Another backend
overrides what it does faster; what it cannot do goes to `reference` with one warning that names the reason.
"""

from abc import ABC, abstractmethod
from array import array
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


@dataclass(frozen=True)
class HostBatch:
    """One step's tokens on the host. S sequences, T tokens in all, oldest first.

    Python's own arrays: a step of one stream makes a handful of short ones, each of which would cost several times as
    long through a library. What they hold is described in `PagedBatch`.

    Attributes:
        tokens: int64 [T], all sequences end to end.
        query_starts: int32 [S + 1].
        context_lens: int32 [S].
        block_tables: int32 [S * table_width], one table after the other.
        slots, positions: int64 [T].
    """

    tokens: "array[int]"
    query_starts: "array[int]"
    context_lens: "array[int]"
    block_tables: "array[int]"
    table_width: int
    slots: "array[int]"
    positions: "array[int]"

    def placed(self, device: torch.device) -> tuple[Tensor, PagedBatch]:
        """The tokens and where they stand, on a device."""

        def place(values: "array[int]", dtype: torch.dtype) -> Tensor:
            return torch.frombuffer(values, dtype=dtype).to(device, non_blocking=True)

        return place(self.tokens, torch.int64), PagedBatch(
            query_starts=self.query_starts.tolist(),
            context_lens=place(self.context_lens, torch.int32),
            block_tables=place(self.block_tables, torch.int32).view(-1, self.table_width),
            slots=place(self.slots, torch.int64),
            positions=place(self.positions, torch.int64),
        )


@dataclass(frozen=True)
class Scores:
    """What becomes of the products of queries and keys; see `Backend.attend`."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None


class Linear(ABC):
    """A packed weight. Calling it multiplies: [T, in] to [T, out], in the dtype of its input.

    Attributes:
        nbytes: what it takes in memory, all of which a product reads.
    """

    in_features: int
    out_features: int
    nbytes: int

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
    """A whole decoder: what `Backend.fuse` takes. `frequencies` are radians a position, float32 [rotated / 2].

    `extras` are what it does beyond what the other fields say, in words. Who does not know each of them must refuse.
    There are no `layers` then.
    """

    layers: list[LayerParts]
    embedding: Tensor
    norm: Tensor
    head: Linear
    frequencies: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    extras: tuple[str, ...] = ()


class FusedDecoder(ABC):
    """All layers of a step in one call, with a KV cache of its own."""

    @abstractmethod
    def hidden(self, batch: HostBatch) -> Tensor:
        """The normed last hidden states, float32 [T, hidden]."""

    @abstractmethod
    def logits(self, batch: HostBatch, rows: "array[int]") -> Tensor:
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
    def pack(self, weights: Sequence[Weight], biases: Sequence[Tensor | None], fine: bool = False) -> Linear:
        """One linear operation whose output is that of these weights side by side ([q | k | v], [gate | up]).

        Weights are [out, in] with one `in` for all; a bias is [out] or None. `fine` says that small errors of the
        result do much harm: a backend that rounds activations of its own accord rounds these more finely.
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
        """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

        The result is of x's dtype; a weight in a wider one multiplies before that rounding.
        """

    @abstractmethod
    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x [T, heads, head_dim] by the angles of cos, sin [T, rotated / 2]; halves paired as Llama's
        Hugging Face checkpoints have them (Su et al. 2021, arXiv:2104.09864)."""

    @abstractmethod
    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        """activation(gate) · up for gate_up = [gate | up], [T, 2n] to [T, n]; silu or gelu_tanh (Shazeer 2020,
        arXiv:2002.05202)."""

    @abstractmethod
    def write_kv(self, cache: KVCache, keys: Tensor, values: Tensor, batch: PagedBatch) -> None:
        """Put keys and values [T, kv_heads, head_dim] into the slots of the batch."""

    @abstractmethod
    def attend(self, queries: Tensor, cache: KVCache, batch: PagedBatch, scores: Scores) -> Tensor:
        """Causal attention of queries [T, heads, head_dim] over the cache; returns the same shape.

        Query heads share key heads in equal runs (grouped queries). With a window of w, a token sees itself and
        the w - 1 before it. With a soft cap of c, scaled scores s become c · tanh(s / c) (Gemma 2, arXiv:2408.00118).
        """

    @abstractmethod
    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Choose a token for each row of float32 logits [R, vocabulary], which are overwritten: int64 [R].

        `reference_sampling` says what is chosen. A row's token depends on its own logits and settings alone.
        """
