"""How the tensors of one module lie in a compressed-tensors checkpoint: a pure encode and decode for each layout.

For a module of I inputs and O outputs in G groups of codes of b bits:

`pack-quantized`, integers
    weight_packed        int32    [O, ceil(I * b / 32)]   codes, packed along the inputs, lowest bits first
    weight_scale         float16  [O, G]
    weight_shape         int64    [2]                     O and I
    weight_zero_point    int32    [ceil(O * b / 32), G]   packed along the outputs; only where codes are asymmetric
    weight_g_idx         int32    [I]                     only where `actorder` is `group`
    (the last two are read, never written: transformers loads neither)
`int-quantized`, integers beside integer activations
    weight               int8     [O, I]                  codes less their middle
    weight_scale         float32  [O, 1]                  or one for the whole matrix, [1]
`float-quantized`, FP8
    weight               float8_e4m3fn  [O, I]
    weight_scale         float32  [O, 1]                  or [1]
`nvfp4-pack-quantized`, FP4 in groups of 16
    weight_packed        uint8    [O, I / 2]              two codes a byte, that of the even input in the low half
    weight_scale         float8_e4m3fn  [O, I / 16]
    weight_global_scale  float32  [1]                     what all of these scales are divided by
`mxfp4-pack-quantized`, FP4 in groups of 32
    weight_packed        uint8    [O, I / 2]
    weight_scale         uint8    [O, I / 32]             e, for 2 ** (e - 127)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmopt.errors import InputError, LlmoptError
from llmopt.weights.formats import bits as bit_stream
from llmopt.weights.formats.base import Load, expect, groups_of, load_as, load_scales, to_float16
from llmopt.weights.numbers import FP4, FP8, INT
from llmopt.weights.quantized import QuantizedTensor, TwoLevel
from llmopt.weights.scheme import PER_CHANNEL

E4M3_NAN = 0x7F  # with either sign
E8M0_NAN = 0xFF


@dataclass(frozen=True)
class Layout(ABC):
    """The settings of modules that are alike.

    Attributes:
        bits: of a code.
        strategy: what shares a scale: `channel` (a row), `group`, `tensor_group`, or `tensor`.
        group_size: -1 where groups are whole rows.
        activations: `int8` or `fp8` where activations are rounded too, per token; else None.
        symmetric: there are no zero points.
        group_index: each module has the group of each input.
    """

    name: ClassVar[str]
    number: ClassVar[str] = INT
    widths: ClassVar[tuple[int, ...]]
    strategies: ClassVar[tuple[str, ...]]
    group_sizes: ClassVar[tuple[int, ...] | None] = None
    """The only group sizes that there are; None where any will do."""
    group_strategy: ClassVar[str] = "group"

    bits: int
    strategy: str
    group_size: int = PER_CHANNEL
    activations: str | None = None
    symmetric: bool = True
    group_index: bool = False

    @abstractmethod
    def encode(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        """The module's tensors by their names in the checkpoint; the weight has passed `check`."""

    @abstractmethod
    def decode(self, module: str, load: Load) -> QuantizedTensor:
        """A module from its tensors. Raises InputError where one is missing or does not fit the others."""

    @abstractmethod
    def shape(self, module: str, load: Load) -> tuple[int, int]:
        """Outputs and inputs; see `Format.shape`."""

    def check(self, module: str, weight: QuantizedTensor) -> None:
        """Raise LlmoptError where a weight is not what these settings say."""
        expect(module, weight, self.bits, self.symmetric, self.group_size, self.number)
        if weight.activations != self.activations:
            raise LlmoptError(f"{module} rounds activations to {weight.activations}, not {self.activations}")
        if weight.group_index is not None:
            raise LlmoptError(f"{module} has a group index, which {self.name} cannot store")

    def load_row_scales(self, module: str, load: Load, shape: torch.Size) -> Tensor:
        """The scales of codes of this shape: floating point [O, G]; one for the whole matrix is given to each row."""
        name = f"{module}.weight_scale"
        out_features, in_features = shape
        if self.strategy == "tensor":
            scale = load_scales(lambda name: load(name).flatten(), name, (1,))
            return scale.float().expand(out_features, 1).contiguous()
        groups = groups_of(in_features, self.group_size)
        return load_scales(load, name, (out_features, groups))


class PackedIntegers(Layout):
    name = "pack-quantized"
    widths = (4, 8)
    strategies = ("channel", "group")

    def encode(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        return {
            f"{module}.weight_packed": bit_stream.pack(weight.codes, self.bits),
            f"{module}.weight_scale": to_float16(weight.scales, module),
            f"{module}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }

    def decode(self, module: str, load: Load) -> QuantizedTensor:
        out_features, in_features = load_as(load, f"{module}.weight_shape", (2,), torch.int64).tolist()
        words = bit_stream.words_for(in_features, self.bits)
        packed = load_as(load, f"{module}.weight_packed", (out_features, words), torch.int32)
        codes = bit_stream.unpack(packed, self.bits, in_features)
        scales = self.load_row_scales(module, load, codes.shape)
        groups = scales.shape[1]
        index = None
        if self.group_index:
            index = load_as(load, f"{module}.weight_g_idx", (in_features,), torch.int32)
            if not 0 <= int(index.min()) <= int(index.max()) < groups:
                raise InputError(f"{module}.weight_g_idx names groups that are not among the {groups} of its scales")
        elif in_features % groups:
            raise InputError(f"{module}.weight_scale has {groups} groups, which do not divide {in_features} inputs")
        zeros = None if self.symmetric else self._zeros(module, load, out_features, groups)
        return QuantizedTensor(codes, scales, zeros, index, self.bits, self.activations).plain_order()

    def shape(self, module: str, load: Load) -> tuple[int, int]:
        out_features, in_features = load_as(load, f"{module}.weight_shape", (2,), torch.int64).tolist()
        return out_features, in_features

    def _zeros(self, module: str, load: Load, out_features: int, groups: int) -> Tensor:
        words = bit_stream.words_for(out_features, self.bits)
        packed = load_as(load, f"{module}.weight_zero_point", (words, groups), torch.int32)
        return bit_stream.unpack(packed.T.contiguous(), self.bits, out_features).T.contiguous()


class Integers(Layout):
    name = "int-quantized"
    widths = (4, 8)
    strategies = ("channel", "group", "tensor")

    def encode(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        return {
            f"{module}.weight": (weight.codes - weight.middle).view(torch.int8),  # bytes wrap round, as is wanted
            f"{module}.weight_scale": weight.scales.float(),
        }

    def decode(self, module: str, load: Load) -> QuantizedTensor:
        stored = load_as(load, f"{module}.weight", (None, None), torch.int8)
        middle = 1 << (self.bits - 1)
        if int(stored.min()) < -middle or int(stored.max()) >= middle:
            raise InputError(f"{module}.weight holds codes that do not fit into {self.bits} bits")
        codes = stored.view(torch.uint8) + middle  # wraps round, as bytes do
        scales = self.load_row_scales(module, load, codes.shape)
        if codes.shape[1] % scales.shape[1]:
            raise InputError(f"{module}: {scales.shape[1]} groups do not divide {codes.shape[1]} inputs")
        return QuantizedTensor(codes, scales, None, None, self.bits, self.activations)

    def shape(self, module: str, load: Load) -> tuple[int, int]:
        out_features, in_features = load_as(load, f"{module}.weight", (None, None), torch.int8).shape
        return out_features, in_features


class Floats(Layout):
    name = "float-quantized"
    number = FP8
    widths = (8,)
    strategies = ("channel", "tensor")

    def encode(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        return {
            f"{module}.weight": weight.codes.view(torch.float8_e4m3fn),
            f"{module}.weight_scale": weight.scales.float(),
        }

    def decode(self, module: str, load: Load) -> QuantizedTensor:
        codes = load_as(load, f"{module}.weight", (None, None), torch.float8_e4m3fn).view(torch.uint8)
        _check_e4m3(f"{module}.weight", codes)
        scales = self.load_row_scales(module, load, codes.shape).float()
        return QuantizedTensor(codes, scales, None, None, self.bits, self.activations, FP8)

    def shape(self, module: str, load: Load) -> tuple[int, int]:
        out_features, in_features = load_as(load, f"{module}.weight", (None, None), torch.float8_e4m3fn).shape
        return out_features, in_features


class NVFP4(Layout):
    name = "nvfp4-pack-quantized"
    number = FP4
    widths = (4,)
    strategies = ("tensor_group",)
    group_strategy = "tensor_group"
    group_sizes = (16,)

    def encode(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        scales = weight.scales
        if (
            not isinstance(scales, TwoLevel)
            or scales.values.dtype != torch.float8_e4m3fn
            or scales.factors.numel() != 1
        ):
            raise LlmoptError(f"{module}: scales for {self.name} are float8_e4m3fn, times one factor for the matrix")
        factor = scales.factors.float().flatten()
        if not _is_divisor(factor):
            raise LlmoptError(f"{module}: the factor of its scales is {factor.item():g}, which has no reciprocal")
        return {
            f"{module}.weight_packed": _pack_pairs(weight.codes),
            f"{module}.weight_scale": scales.values,
            f"{module}.weight_global_scale": 1 / factor,  # exact, as methods choose a power of two
        }

    def decode(self, module: str, load: Load) -> QuantizedTensor:
        codes = _load_pairs(module, load, self.group_size)
        shape = (codes.shape[0], codes.shape[1] // self.group_size)
        values = load_as(load, f"{module}.weight_scale", shape, torch.float8_e4m3fn)
        _check_e4m3(f"{module}.weight_scale", values.view(torch.uint8))
        divisor = load_as(load, f"{module}.weight_global_scale", (1,), torch.float32)
        if not _is_divisor(divisor):
            raise InputError(f"{module}.weight_global_scale is {divisor.item():g}, by which nothing can be divided")
        scales = TwoLevel(values, (1 / divisor).view(1, 1))
        return QuantizedTensor(codes, scales, None, None, self.bits, self.activations, FP4)

    def shape(self, module: str, load: Load) -> tuple[int, int]:
        return _shape_of_pairs(module, load)


class MXFP4(Layout):
    name = "mxfp4-pack-quantized"
    number = FP4
    widths = (4,)
    strategies = ("group",)
    group_sizes = (32,)

    def encode(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        scales = weight.scales
        if not isinstance(scales, Tensor) or scales.dtype != torch.float8_e8m0fnu:
            raise LlmoptError(f"{module}: scales for {self.name} are powers of two, in float8_e8m0fnu")
        exponents = scales.view(torch.uint8)
        if (exponents == E8M0_NAN).any():
            raise LlmoptError(f"{module}: its scales are not finite")
        return {f"{module}.weight_packed": _pack_pairs(weight.codes), f"{module}.weight_scale": exponents}

    def decode(self, module: str, load: Load) -> QuantizedTensor:
        codes = _load_pairs(module, load, self.group_size)
        shape = (codes.shape[0], codes.shape[1] // self.group_size)
        exponents = load_as(load, f"{module}.weight_scale", shape, torch.uint8)
        if (exponents == E8M0_NAN).any():
            raise InputError(f"{module}.weight_scale holds scales that are not finite")
        scales = exponents.view(torch.float8_e8m0fnu)
        return QuantizedTensor(codes, scales, None, None, self.bits, self.activations, FP4)

    def shape(self, module: str, load: Load) -> tuple[int, int]:
        return _shape_of_pairs(module, load)


LAYOUTS: dict[str, type[Layout]] = {kind.name: kind for kind in (PackedIntegers, Integers, Floats, NVFP4, MXFP4)}
"""Every layout by the name that is its `format` in config.json."""


def _pack_pairs(codes: Tensor) -> Tensor:
    """uint8 codes of 4 bits [O, I] into uint8 [O, I / 2]."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def _shape_of_pairs(module: str, load: Load) -> tuple[int, int]:
    out_features, in_bytes = load_as(load, f"{module}.weight_packed", (None, None), torch.uint8).shape
    return out_features, 2 * in_bytes


def _load_pairs(module: str, load: Load, group_size: int) -> Tensor:
    """The codes of `weight_packed`, uint8 [O, I], where I is whole groups."""
    packed = load_as(load, f"{module}.weight_packed", (None, None), torch.uint8)
    if 2 * packed.shape[1] % group_size:
        raise InputError(f"{module}.weight_packed has {2 * packed.shape[1]} inputs, not whole groups of {group_size}")
    return bit_stream.spread(packed, 4)


def _check_e4m3(name: str, numbers: Tensor) -> None:
    """Raise InputError where one of these float8_e4m3fn numbers, given as uint8, is NaN."""
    if ((numbers & E4M3_NAN) == E4M3_NAN).any():
        raise InputError(f"{name} holds numbers that are not finite")


def _is_divisor(number: Tensor) -> bool:
    """Whether a single float32, and what comes of dividing by it, is positive and finite."""
    return (
        bool(number > 0) and bool(torch.isfinite(number)) and bool(torch.isfinite(1 / number)) and bool(1 / number > 0)
    )
