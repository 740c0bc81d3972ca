"""The CPU kernels at their fastest: activations are rounded to 8 bits where they meet quantized weights, to 16 else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmopt.backend.base import DecoderParts, FusedDecoder, Linear
from llmopt.backend.cpu import CpuBackend, packing_order, uneven_groups, why_not
from llmopt.backend.cpu_decoder import CpuDecoder
from llmopt.backend.reference import ReferenceBackend
from llmopt.kernels._cpu import DenseWeight, IntegerWeight, Multiplier
from llmopt.weights.numbers import FP4, FP8, all_finite
from llmopt.weights.quantized import QuantizedTensor, Scales, TwoLevel, Weight

LARGEST_HALF = 65504.0
STEP = 64
"""The most inputs that share a scale where activations are rounded: more would cost accuracy and save nothing."""
FINE_STEP = 32
"""The same for products that are to be fine (`Backend.pack`): their inputs were more than half of what rounding costs,
and half of that goes by halving their steps."""


class RoundedLinear(Linear):
    """Packed weights whose outputs lie side by side."""

    def __init__(self, multiplier: Multiplier, parts: list[IntegerWeight | DenseWeight]) -> None:
        self.multiplier = multiplier
        self.parts = parts
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)
        self.nbytes = sum(part.nbytes for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [T, in] to float32 [T, out]."""
        x = x.contiguous()
        y = torch.empty(x.shape[0], self.out_features)
        target = y.data_ptr()
        for part in self.parts:
            self.multiplier.multiply_rounded(
                part, x.data_ptr(), self.in_features, x.shape[0], target, self.out_features
            )
            target += part.out_features * y.element_size()
        return y


class RoundedCpuBackend(CpuBackend):
    """As CpuBackend, with activations rounded at every product.

    Against integer and FP4 weights they are rounded to int8, with a scale for each token and group of at most STEP
    inputs; where the scheme itself rounds them, as it says. Against other FP8 weights and against bfloat16, which all
    unquantized weights are in where the processor multiplies it, they are rounded to bfloat16. What passes between
    products stays float32. The KV cache is bfloat16.

    A decoder whose weights all have kernels runs as one operation (`fuse`); where one has not, each layer's operations
    are called one by one, and that weight's are the reference's.
    """

    @property
    def cache_kind(self) -> str:
        return "bfloat16"

    def pack(self, weights: Sequence[Weight], biases: Sequence[Tensor | None], fine: bool = False) -> Linear:
        for weight in weights:
            reason = why_not_rounded(weight) if isinstance(weight, QuantizedTensor) else None
            if reason is not None:
                self._warn_once(reason)
                return ReferenceBackend.pack(self, weights, biases, fine)
        step = FINE_STEP if fine else STEP
        parts = [pack_part(self.multiplier, w, b, step) for w, b in zip(weights, biases, strict=True)]
        return RoundedLinear(self.multiplier, parts)

    def embedding(self, table: Weight) -> Tensor:
        """In 16 bits: rounding it costs less than any product does."""
        to = table.to if isinstance(table, Tensor) else table.dequantize
        halves = to(torch.float16)  # never all of it in float32, which may be more than fits
        return (halves if all_finite(halves) else to(torch.bfloat16)).contiguous()

    def fuse(self, parts: DecoderParts, blocks: int, block_size: int, cache_dtype: str) -> FusedDecoder | None:
        reason = CpuDecoder.why_not(parts, block_size, cache_dtype)
        if reason is not None:
            self._warn_once(reason)
            return None
        return CpuDecoder(self.multiplier, parts, blocks, block_size, cache_dtype)


def why_not_rounded(weight: QuantizedTensor) -> str | None:
    """What about this weight the kernels that round activations cannot do, or None."""
    if weight.number not in (FP4, FP8):
        return why_not(weight, minimums=True)
    if weight.minimums is not None:
        return f"weights in {weight.number} have no kernel where their groups have minimums"
    rounds = (None,) if weight.number == FP4 else (None, "fp8")
    if weight.activations not in rounds:
        return f"weights in {weight.number} have no kernel for activations rounded to {weight.activations}"
    if weight.number == FP4:
        return uneven_groups(weight)
    if weight.scales.shape[1] != 1:
        return "weights in fp8 have a kernel only where each row has one scale"
    return "weights in fp8 have a kernel only for an even number of inputs" if weight.shape[1] % 2 else None


def pack_part(
    multiplier: Multiplier, weight: Weight, bias: Tensor | None, longest_step: int = STEP
) -> IntegerWeight | DenseWeight:
    """A weight [out, in] in the layout of the kernels; bias float [out].

    At most `longest_step` inputs of a row that it meets are rounded with one scale, unless its scheme says otherwise.
    """
    bias = None if bias is None else bias.float().contiguous()
    if isinstance(weight, Tensor):
        values = _to_multiply(weight, multiplier.native_bfloat16)
        return DenseWeight(values.view(torch.uint16), values.dtype == torch.bfloat16, bias)
    if weight.number == FP8:
        scales = weight.scales.float().flatten().contiguous()
        return DenseWeight(weight.codes.contiguous(), scales, weight.activations is not None, bias)
    weight = weight.plain_order()
    scales, scale_bytes = level_of(weight.scales)
    minimums, minimum_bytes = (None, None) if weight.minimums is None else level_of(weight.minimums)
    return IntegerWeight(
        multiplier,
        codes=weight.codes.contiguous(),
        groups=weight.scales.shape[1],
        scales=scales,
        scale_bytes=scale_bytes,
        zeros=None if weight.zeros is None else weight.zeros.contiguous(),
        minimums=minimums,
        minimum_bytes=minimum_bytes,
        bias=bias,
        order=packing_order(weight),
        bits=weight.bits,
        fp4=weight.number == FP4,
        whole_rows=weight.activations is not None,
        longest_step=longest_step,
    )


def _to_multiply(weight: Tensor, native_bfloat16: bool) -> Tensor:
    """A weight [out, in] in 16 bits: bfloat16 where the processor multiplies it, since float16 would be widened to
    float32 and take several times as long where there are many rows."""
    if weight.shape[1] % 2:  # kernels take bfloat16 in pairs
        return weight.to(torch.float16)
    return weight.to(torch.bfloat16).contiguous() if native_bfloat16 else in_16_bits(weight)


def in_16_bits(weight: Tensor) -> Tensor:
    """bfloat16 as it is; all else as float16 where it fits, since that keeps three bits more."""
    fits = weight.dtype != torch.bfloat16 and float(weight.abs().max()) <= LARGEST_HALF
    return weight.to(torch.float16 if fits else torch.bfloat16).contiguous()


def level_of(numbers: Scales) -> tuple[Tensor, Tensor | None]:
    """Scales or minimums as floats [out, groups], or as factors [out, runs] and the bytes [out, groups] that they
    scale: int8, or uint8 that are the bits of e4m3 numbers."""
    if not isinstance(numbers, TwoLevel):
        return numbers.float().contiguous(), None
    values, bytes_ = numbers.values, None
    if values.dtype == torch.float8_e4m3fn:
        bytes_ = values.view(torch.uint8)
    elif values.dtype == torch.int8 or (values.dtype == torch.uint8 and int(values.max()) < 128):
        bytes_ = values.to(torch.int8)
    if bytes_ is None:
        return numbers.float().contiguous(), None
    return numbers.factors.float().expand(numbers.shape[0], -1).contiguous(), bytes_.contiguous()
