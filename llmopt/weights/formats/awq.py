"""The AWQ checkpoint in its `gemm` version, as AutoAWQ writes it: 4-bit codes with zero points.

For a module of I inputs and O outputs in G groups:

    qweight  int32    [I, O / 8]   codes, packed along the outputs
    qzeros   int32    [G, O / 8]   zero points, packed alike
    scales   float16  [G, O]

Half-byte i of a word, lowest first, holds the output of `ORDER[i]` among the word's eight.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from llmopt.errors import InputError, LlmoptError
from llmopt.weights.formats import bits as bit_stream
from llmopt.weights.formats.base import (
    Format,
    Load,
    Settings,
    expect,
    load_as,
    load_scales,
    parse_settings,
    to_float16,
    zero_points,
)
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import PER_CHANNEL, Scheme

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class _Config(Settings):
    bits: Literal[4] = 4
    group_size: int
    zero_point: Literal[True] = True
    version: Literal["gemm", "GEMM"] = "gemm"
    modules_to_not_convert: list[str] | None = None


@dataclass(frozen=True)
class AWQ(Format):
    """An AWQ checkpoint's settings.

    Attributes:
        group_size: -1 for one group a row.
        ignore: modules that stay dense.
    """

    name: ClassVar[str] = "awq"
    schemes: ClassVar[tuple[str, ...]] = ("w4a16-asym",)
    quantizes_head: ClassVar[bool] = False

    group_size: int
    ignore: tuple[str, ...] = ("lm_head",)

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], desc_act: bool = False, damp: float | None = None) -> Self:
        quantized, ignore = cls.split(schemes)
        if desc_act:
            raise InputError("awq stores no group index, so --desc-act cannot be written to it")
        sizes = {scheme.group_size or PER_CHANNEL for scheme in quantized.values()}
        if len(sizes) > 1:
            raise InputError("awq has one group size for all modules; gptq and compressed-tensors can mix them")
        return cls(sizes.pop(), ignore)

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        read = parse_settings(_Config, config, cls.name)
        if read.group_size != PER_CHANNEL and read.group_size < 1:
            raise InputError(f"quantization_config of awq: group_size is {read.group_size}, not positive or -1")
        return cls(read.group_size, tuple(read.modules_to_not_convert or ()))

    def config(self) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": self.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(self.ignore),
        }

    def holds(self, module: str, names: Container[str]) -> bool:
        return f"{module}.qweight" in names

    def encode(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        expect(module, weight, BITS, False, self.group_size)
        if weight.group_index is not None:
            raise LlmoptError(f"{module} has a group index, which awq cannot store")
        if weight.shape[0] % len(ORDER):
            raise LlmoptError(f"{module} has {weight.shape[0]} outputs, not a multiple of the {len(ORDER)} of a word")
        return {
            f"{module}.qweight": _pack(weight.codes.T),
            f"{module}.qzeros": _pack(zero_points(module, weight).T),
            f"{module}.scales": to_float16(weight.scales, module).T.contiguous(),
        }

    def decode(self, module: str, load: Load) -> QuantizedTensor:
        packed = load_as(load, f"{module}.qweight", (None, None), torch.int32)
        in_features, words = packed.shape
        scales = load_scales(load, f"{module}.scales", (None, words * len(ORDER)))
        groups = scales.shape[0]
        if not groups or in_features % groups:
            raise InputError(f"{module}.scales has {groups} groups, which do not divide {in_features} inputs")
        zeros = load_as(load, f"{module}.qzeros", (groups, words), torch.int32)
        return QuantizedTensor(_unpack(packed), scales.T.contiguous(), _unpack(zeros), None, BITS)

    def shape(self, module: str, load: Load) -> tuple[int, int]:
        packed = load_as(load, f"{module}.qweight", (None, None), torch.int32)
        return packed.shape[1] * len(ORDER), packed.shape[0]


def _pack(values: Tensor) -> Tensor:
    """uint8 [rows, outputs] into int32 [rows, outputs / 8]."""
    return bit_stream.pack(values.unflatten(1, (-1, len(ORDER)))[..., list(ORDER)].flatten(1), BITS)


def _unpack(words: Tensor) -> Tensor:
    """int32 [rows, outputs / 8] into uint8 [outputs, rows]."""
    turned = words.T.contiguous()
    values = torch.empty(turned.shape[0], len(ORDER), turned.shape[1], dtype=torch.uint8, device=words.device)
    for place, output in enumerate(ORDER):
        values[:, output] = turned >> place * BITS & 0xF
    return values.flatten(0, 1)
