"""The compiled CPU kernels: quantized weights are multiplied as they are, without a copy in floating point."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from llmopt.backend.base import Linear, PagedBatch, Scores
from llmopt.backend.kv_cache import KVCache
from llmopt.backend.reference import ReferenceBackend
from llmopt.backend.sampling import SamplingBatch
from llmopt.errors import InputError
from llmopt.kernels._cpu import Multiplier, PackedWeight, instruction_sets
from llmopt.weights.numbers import INT
from llmopt.weights.quantized import QuantizedTensor, Weight

HEAD_STEP = 16  # the attention kernel reads heads in whole vectors
GROUP_STEP = 8  # the kernels read groups in words of eight 4-bit codes
MOST_INTEGER_INPUTS = 65_536  # so many products of two 8-bit codes fit a 32-bit sum

_logger = logging.getLogger(__name__)


class CpuLinear(Linear):
    """Parts whose outputs lie side by side: packed weights and, where the kernels cannot, the reference's linears."""

    def __init__(self, multiplier: Multiplier, parts: Sequence[PackedWeight | Linear]) -> None:
        self.multiplier = multiplier
        self.parts = parts
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)
        self.nbytes = sum(part.nbytes for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [T, in] to float32 [T, out]. Raises ValueError for another dtype or width."""
        if x.dtype != torch.float32 or x.shape[1:] != (self.in_features,):
            raise ValueError(f"activations are {x.dtype} {tuple(x.shape)}, not float32 [T, {self.in_features}]")
        if x.stride(1) != 1:
            x = x.contiguous()
        y = torch.empty(x.shape[0], self.out_features)
        column = 0
        for part in self.parts:
            if isinstance(part, Linear):
                y[:, column : column + part.out_features] = part(x)
            else:
                target = y.data_ptr() + column * y.element_size()
                self.multiplier.multiply(part, x.data_ptr(), x.stride(0), x.shape[0], target, self.out_features)
            column += part.out_features
        return y


class CpuBackend(ReferenceBackend):
    """The reference with compiled products of quantized weights and compiled attention for decoding.

    Activations are float32; products of dense weights, and attention of prompts, stay torch's.

    Its threads and torch's take turns: a kernel has returned before torch goes on.
    """

    name = "cpu"

    def __init__(self, threads: int, instruction_set: str = "auto") -> None:
        """The calling thread is one of the threads. Raises InputError where the processor lacks the instruction set."""
        super().__init__("cpu", torch.float32)
        known = ("auto", *instruction_sets())
        if instruction_set not in known:
            raise InputError(
                f"instruction set {instruction_set!r} is not on this processor; it has: {', '.join(known)}"
            )
        self.multiplier = Multiplier(threads, instruction_set)
        self._warned: set[str] = set()

    def pack(self, weights: Sequence[Weight], biases: Sequence[Tensor | None], fine: bool = False) -> Linear:
        pieces = list(zip(weights, biases, strict=True))
        parts = [self._pack_part(run) for run in mergeable_runs(pieces)]
        only = parts[0]
        return only if len(parts) == 1 and isinstance(only, Linear) else CpuLinear(self.multiplier, parts)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        if logits.dtype != torch.float32 or not logits.is_contiguous():
            raise ValueError(f"logits are {logits.dtype} with strides {logits.stride()}, not contiguous float32")
        tokens = torch.empty(logits.shape[0], dtype=torch.int64)
        self.multiplier.sample(logits.data_ptr(), *logits.shape, tokens.data_ptr(), *batch)
        return tokens

    def _attend_decode(
        self, queries: Tensor, cache: KVCache, batch: PagedBatch, sequences: list[int], scores: Scores
    ) -> Tensor:
        heads, head_dim = queries.shape[1:]
        _, block_size, kv_heads, _ = cache.keys.shape
        if cache.keys.dtype != torch.float32 or head_dim % HEAD_STEP:
            self._warn_once(f"attention is compiled for a float32 cache and head sizes of a multiple of {HEAD_STEP}")
            return super()._attend_decode(queries, cache, batch, sequences, scores)
        if scores.soft_cap is not None:
            self._warn_once("attention is compiled without a soft cap of its scores")
            return super()._attend_decode(queries, cache, batch, sequences, scores)
        tables, contexts = batch.block_tables, batch.context_lens
        if len(sequences) < len(contexts):
            tables, contexts = tables[sequences], contexts[sequences]
        queries = queries.contiguous()
        result = torch.empty_like(queries)
        self.multiplier.attend(
            queries=queries.data_ptr(),
            out=result.data_ptr(),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            tables=tables.data_ptr(),
            contexts=contexts.data_ptr(),
            sequences=len(sequences),
            table_width=tables.shape[1],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            window=scores.window or 0,
            scale=scores.scale,
        )
        return result

    def _pack_part(self, pieces: list[tuple[Weight, Tensor | None]]) -> PackedWeight | Linear:
        weights, biases = [weight for weight, _ in pieces], [bias for _, bias in pieces]
        quantized = [weight for weight in weights if isinstance(weight, QuantizedTensor)]
        if not quantized:
            return super().pack(weights, biases)
        reason = why_not(quantized[0])
        if reason is not None:
            self._warn_once(reason)
            return super().pack(weights, biases)
        return packed(quantized, self.join_biases(weights, biases))

    def _warn_once(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            _logger.warning("some operations run on plain torch: %s", reason)


def packed(weights: list[QuantizedTensor], bias: Tensor | None) -> PackedWeight:
    """Weights of one kind, outputs side by side, in the layout of the kernels. `bias` is float32 [all outputs]."""
    first = weights[0]
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    order = packing_order(first)
    return PackedWeight(
        codes=torch.cat([weight.codes for weight in weights]),
        scales=torch.cat([weight.scales.float() for weight in weights]),
        zeros=torch.cat(zeros) if zeros else None,
        bias=bias,
        order=order,
        bits=first.bits,
        integer_activations=first.activations is not None,
    )


def mergeable_runs(pieces: list[tuple[Weight, Tensor | None]]) -> list[list[tuple[Weight, Tensor | None]]]:
    """Neighbours that one kernel call can serve, together."""
    runs: list[list[tuple[Weight, Tensor | None]]] = []
    for piece in pieces:
        if runs and same_kind(runs[-1][-1][0], piece[0]):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def same_kind(a: Weight, b: Weight) -> bool:
    """Whether two weights differ in nothing but their numbers and their outputs."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor)
    kinds = [(w.number, w.bits, w.activations, w.zeros is None, w.minimums is None, w.scales.shape[1]) for w in (a, b)]
    if a.group_index is None or b.group_index is None:
        return kinds[0] == kinds[1] and a.group_index is b.group_index
    return kinds[0] == kinds[1] and torch.equal(a.group_index, b.group_index)


def why_not(weight: QuantizedTensor, minimums: bool = False) -> str | None:
    """What about this weight the kernels of integers cannot do, or None; `minimums` says whether they know those."""
    if weight.number != INT:
        return f"weights in {weight.number} have kernels only where activations are rounded, not in float32"
    if weight.minimums is not None and not minimums:
        return "weights whose groups have minimums in place of zero points have no kernel"
    if weight.activations is not None:
        if weight.activations != "int8":
            return f"activations are rounded to int8 only, not {weight.activations}"
        if weight.scales.shape[1] != 1 or weight.zeros is not None:
            return "activations of 8 bits need symmetric weights with one scale a row, without groups"
        if weight.shape[1] > MOST_INTEGER_INPUTS:
            return f"activations of 8 bits are compiled for at most {MOST_INTEGER_INPUTS} inputs"
    return uneven_groups(weight)


def uneven_groups(weight: QuantizedTensor) -> str | None:
    """The reason against a weight whose groups are of very unequal sizes, or None."""
    sizes = torch.bincount(weight.groups(), minlength=weight.scales.shape[1])
    # Every group is padded to the longest, so very unequal ones would cost more than they save.
    if int(sizes.max()) > 2 * weight.group_size:
        return "the groups of a weight are of very unequal sizes"
    return None


def packing_order(weight: QuantizedTensor) -> Tensor | None:
    """int32 [packed inputs]: which input stands at each place, -1 for none; None where inputs stay as they are.

    Groups become runs of equal length, a multiple of GROUP_STEP.
    """
    plain = weight.plain_order()
    groups = plain.groups()
    count = plain.scales.shape[1]
    sizes = torch.bincount(groups, minlength=count)
    length = -(-int(sizes.max()) // GROUP_STEP) * GROUP_STEP
    if plain.group_index is None and int(sizes.max()) == length:
        return None
    by_group = torch.argsort(groups, stable=True)
    starts = torch.cumsum(sizes, 0) - sizes
    place_in_group = torch.arange(len(groups)) - starts[groups[by_group]]
    order = torch.full((count * length,), -1, dtype=torch.int32)
    order[groups[by_group] * length + place_in_group] = by_group.int()
    return order
