"""Every operation in plain torch, on any torch device: the truth that other backends are tested against."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.backend import reference_sampling
from llmopt.backend.base import Backend, Linear, PagedBatch, Scores
from llmopt.backend.kv_cache import KVCache
from llmopt.backend.sampling import SamplingBatch
from llmopt.errors import InputError
from llmopt.weights.numbers import FP8, LARGEST, rounded
from llmopt.weights.quantized import QuantizedTensor, Weight

PADDING = 64  # tokens of padding that cost less than another call


class ReferenceLinear(Linear):
    """A matrix in floating point, dequantized when it was packed.

    Where the scheme rounds activations at run time (`activations`), so does this: that is part of what the
    artifact means, not a shortcut of a kernel. Nothing else is rounded.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activations: str | None) -> None:
        self.weight = weight
        self.bias = bias
        self.activations = activations
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        if self.activations is not None:
            x = round_activations(x, self.activations)
        if x.dtype == self.weight.dtype:
            return F.linear(x, self.weight, self.bias)
        product = F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        return product if self.bias is None else product.add_(self.bias)


class ReferenceBackend(Backend):
    """Plain torch on one device, activations in one dtype, and matrix products in that or another."""

    name = "reference"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        products: torch.dtype | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.products = products or dtype

    def pack(self, weights: Sequence[Weight], biases: Sequence[Tensor | None], fine: bool = False) -> Linear:
        activations = {w.activations if isinstance(w, QuantizedTensor) else None for w in weights}
        if len(activations) > 1:
            raise InputError(
                "weights that share an input must all round it, to the same kind of number, or none of them"
            )
        dtype = self.products
        dense = [w.dequantize(dtype) if isinstance(w, QuantizedTensor) else w.to(dtype) for w in weights]
        matrix = dense[0] if len(dense) == 1 else torch.cat(dense)
        return ReferenceLinear(matrix.to(self.device), self.join_biases(weights, biases), activations.pop())

    def join_biases(self, weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> Tensor | None:
        """The biases of several weights as one vector, zeros where one has none; None where none has one."""
        if all(bias is None for bias in biases):
            return None
        parts = [torch.zeros(w.shape[0]) if b is None else b.float() for w, b in zip(weights, biases, strict=True)]
        return torch.cat(parts).to(self.device, self.dtype)

    def embedding(self, table: Weight) -> Tensor:
        dense = table.dequantize(self.dtype) if isinstance(table, QuantizedTensor) else table
        return dense.to(self.device, self.dtype)

    def kv_cache(self, kind: str, blocks: int, block_size: int, kv_heads: int, head_dim: int) -> KVCache:
        return KVCache.allocate(kind, blocks, block_size, kv_heads, head_dim, self.device)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if weight.dtype == x.dtype:
            return normed.to(x.dtype) * weight
        return (normed * weight).to(x.dtype)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = cos.shape[-1]
        cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    def write_kv(self, cache: KVCache, keys: Tensor, values: Tensor, batch: PagedBatch) -> None:
        cache.write(batch.slots, keys, values)

    def attend(self, queries: Tensor, cache: KVCache, batch: PagedBatch, scores: Scores) -> Tensor:
        starts = batch.query_starts
        single = [s for s in range(len(starts) - 1) if starts[s + 1] - starts[s] == 1]
        if len(single) == len(starts) - 1:
            return self._attend_decode(queries, cache, batch, single, scores)
        result = torch.empty_like(queries)
        if single:
            rows = torch.tensor([starts[s] for s in single], device=queries.device)
            result[rows] = self._attend_decode(queries[rows], cache, batch, single, scores)
        for s in set(range(len(starts) - 1)).difference(single):
            span = slice(starts[s], starts[s + 1])
            result[span] = self._attend_sequence(queries[span], cache, batch, s, scores)
        return result

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        return reference_sampling.sample(logits, batch)

    def _attend_decode(
        self, queries: Tensor, cache: KVCache, batch: PagedBatch, sequences: list[int], scores: Scores
    ) -> Tensor:
        """These sequences, which have one query each: [len(sequences), heads, head_dim]."""
        result = torch.empty_like(queries)
        row_of = {sequence: row for row, sequence in enumerate(sequences)}
        for run in _alike(sequences, batch.context_lens.tolist()):
            rows = torch.tensor([row_of[s] for s in run], device=queries.device)
            if len(run) > 1:
                result[rows] = self._attend_single(queries[rows], cache, batch, run, scores)
            else:
                result[rows] = self._attend_sequence(queries[rows], cache, batch, run[0], scores)
        return result

    def _attend_single(
        self, queries: Tensor, cache: KVCache, batch: PagedBatch, sequences: list[int], scores: Scores
    ) -> Tensor:
        """Sequences with one query each (decode), padded to the longest context: [S, heads, head_dim]."""
        context = batch.context_lens[sequences]
        longest = int(context.max())
        blocks = -(-longest // cache.keys.shape[1])
        tables = batch.block_tables[sequences, :blocks].long()
        keys, values = (found[:, :longest].transpose(1, 2) for found in cache.read(tables, queries.dtype))
        position = torch.arange(longest, device=queries.device)
        visible = position < context[:, None]
        if scores.window is not None:
            visible &= position >= context[:, None] - scores.window
        return attention(queries[:, :, None], keys, values, visible[:, None, None, :], scores)[:, :, 0]

    def _attend_sequence(
        self, queries: Tensor, cache: KVCache, batch: PagedBatch, sequence: int, scores: Scores
    ) -> Tensor:
        """One sequence's queries (a chunk of its prompt) over its context: [n, heads, head_dim]."""
        context, count = int(batch.context_lens[sequence]), queries.shape[0]
        blocks = -(-context // cache.keys.shape[1])
        table = batch.block_tables[sequence, :blocks].long()
        keys, values = (found[:context].transpose(0, 1) for found in cache.read(table, queries.dtype))
        mask = causal_mask(count, context, scores.window, queries.device)
        out = attention(queries.transpose(0, 1)[None], keys[None], values[None], mask, scores)
        return out[0].transpose(0, 1)


def _alike(sequences: list[int], contexts: list[int]) -> list[list[int]]:
    """Runs of sequences whose contexts differ by less than half, so that padding them wastes little."""
    runs: list[list[int]] = []
    for sequence in sorted(sequences, key=contexts.__getitem__):
        if runs and contexts[sequence] < 2 * contexts[runs[-1][0]] + PADDING:
            runs[-1].append(sequence)
        else:
            runs.append([sequence])
    return runs


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Attention of queries [n, heads, q, d] over keys and values [n, kv_heads, k, d]: the shape of the queries.

    The mask is bool and broadcasts to [n, heads, q, k]; None stands for causal attention of as many queries as keys.
    It has the window in it already.
    """
    scale, cap = scores.scale, scores.soft_cap
    if cap is None:
        return F.scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    if mask is None:
        mask = causal_mask(queries.shape[2], keys.shape[2], None, queries.device)
    sharing = queries.shape[1] // keys.shape[1]
    keys, values = (part.repeat_interleave(sharing, dim=1) for part in (keys, values))
    capped = (queries @ keys.transpose(2, 3)).float().mul(scale / cap).tanh().mul(cap)
    return capped.masked_fill(~mask, -torch.inf).softmax(-1).to(values.dtype) @ values


def causal_mask(queries: int, context: int, window: int | None, device: torch.device) -> Tensor:
    """bool [queries, context]: which tokens the last `queries` of `context` tokens may see."""
    row = torch.arange(context - queries, context, device=device)[:, None]
    column = torch.arange(context, device=device)[None, :]
    mask = column <= row
    return mask if window is None else mask & (column > row - window)


def round_activations(x: Tensor, number: str) -> Tensor:
    """Round each row of x to `int8` or `fp8` numbers with a scale of its own, symmetric, and back.

    The scale puts the row's largest value on the largest number, 127 or 448.
    """
    largest = 127.0 if number == "int8" else LARGEST[FP8]
    scale = x.abs().amax(-1, keepdim=True).float() / largest
    scale = torch.where(scale == 0, 1.0, scale)  # an all-zero row stays zero
    scaled = x.float() / scale
    return ((scaled.round() if number == "int8" else rounded(scaled, FP8, 0)) * scale).to(x.dtype)
