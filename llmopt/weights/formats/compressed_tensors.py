"""The compressed-tensors checkpoint, as llm-compressor writes it and vLLM and transformers read it.

For a module of I inputs and O outputs in G groups, in symmetric codes of b bits, `pack-quantized` has

    weight_packed  int32    [O, ceil(I * b / 32)]   codes, packed along the inputs, lowest bits first
    weight_scale   float16  [O, G]
    weight_shape   int64    [2]                     O and I
    weight_g_idx   int32    [I]                     only where `actorder` is `group`; read, never written

and `int-quantized`, which is for integer activations,

    weight         int8     [O, I]                  codes less their middle
    weight_scale   float32  [O, 1]
"""

from collections.abc import Container, Sequence
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
    parse_settings,
    to_float16,
)
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import PER_CHANNEL, Scheme

PACKED, INTEGER = "pack-quantized", "int-quantized"


class _Weights(Settings):
    num_bits: Literal[4, 8]
    type: Literal["int"] = "int"
    symmetric: Literal[True] = True
    strategy: Literal["channel", "group"]
    group_size: int | None = None
    dynamic: Literal[False] = False
    actorder: Literal["group", "weight", "static", True, False] | None = None


class _Activations(Settings):
    num_bits: Literal[8]
    type: Literal["int"] = "int"
    symmetric: Literal[True] = True
    strategy: Literal["token"]
    dynamic: Literal[True]


class _Group(Settings):
    weights: _Weights
    input_activations: _Activations | None = None
    output_activations: None = None
    format: Literal["pack-quantized", "int-quantized"] | None = None


class _Sparsity(Settings):
    format: Literal["dense"] = "dense"


class _Config(Settings):
    config_groups: dict[str, _Group]
    format: Literal["pack-quantized", "int-quantized", "mixed-precision"] = "pack-quantized"
    quantization_status: Literal["compressed"] = "compressed"
    ignore: list[str] | None = None
    kv_cache_scheme: None = None
    sparsity_config: _Sparsity | None = None
    transform_config: dict[Any, Any] | None = None


@dataclass(frozen=True)
class CompressedTensors(Format):
    """A compressed-tensors checkpoint's settings: one group of settings for all its linear layers.

    Attributes:
        layout: `pack-quantized` or `int-quantized`.
        bits: 4 or 8.
        group_size: -1 for one group a row.
        activations: `int8` where activations are rounded too, per token; else None.
        group_index: each module has the group of each input.
        ignore: modules that stay dense.
    """

    name: ClassVar[str] = "compressed-tensors"
    schemes: ClassVar[tuple[str, ...]] = ("w4a16", "w8a16", "w8a8")

    layout: str
    bits: int
    group_size: int
    activations: str | None = None
    group_index: bool = False
    ignore: tuple[str, ...] = ("lm_head",)

    @classmethod
    def for_scheme(
        cls,
        scheme: Scheme,
        ignore: Sequence[str] = ("lm_head",),
        desc_act: bool = False,
        damp: float | None = None,
    ) -> Self:
        cls.check(scheme)
        if desc_act:
            raise InputError("compressed-tensors stores no group index, so --desc-act cannot be written to it")
        if scheme.group_size is None:
            raise ValueError("the group size is not settled")
        layout = INTEGER if scheme.activations else PACKED
        return cls(layout, scheme.bits, scheme.group_size, scheme.activations, False, tuple(ignore))

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        read = parse_settings(_Config, config, cls.name)
        if len(read.config_groups) != 1:
            raise InputError(
                f"quantization_config of {cls.name} has {len(read.config_groups)} config_groups; exactly one is read"
            )
        if read.transform_config:
            raise InputError(f"quantization_config of {cls.name} has a transform_config, which is not supported")
        (group,) = read.config_groups.values()
        weights = group.weights
        if weights.strategy == "group" and (weights.group_size or 0) < 1:
            raise InputError(f"quantization_config of {cls.name} has groups without a positive group_size")
        layout = group.format or read.format
        if layout not in (PACKED, INTEGER):
            raise InputError(f"quantization_config of {cls.name} is {layout} and its group does not say what it is")
        size = PER_CHANNEL if weights.strategy == "channel" or weights.group_size is None else weights.group_size
        indexed = weights.actorder in ("group", True)
        return cls(
            layout, weights.num_bits, size, "int8" if group.input_activations else None, indexed, tuple(read.ignore or ())
        )

    def config(self) -> dict[str, Any]:
        per_row = self.group_size == PER_CHANNEL
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if per_row else "group",
            "group_size": None if per_row else self.group_size,
            "dynamic": False,
        }
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "quant_method": self.name,
            "format": self.layout,
            "quantization_status": "compressed",
            "ignore": list(self.ignore),
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": activations if self.activations else None,
                    "output_activations": None,
                    "format": self.layout,
                }
            },
        }

    def holds(self, module: str, names: Container[str]) -> bool:
        return f"{module}.weight_scale" in names

    def encode(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        expect(module, weight, self.bits, True, None if self.group_size == PER_CHANNEL else self.group_size)
        if weight.activations != self.activations:
            raise LlmoptError(
                f"{module} rounds activations to {weight.activations}, not {self.activations}"
            )
        if weight.group_index is not None:
            raise LlmoptError(f"{module} has a group index, which {self.name} cannot store")
        if self.layout == INTEGER:
            return {
                f"{module}.weight": (weight.codes - weight.middle).view(torch.int8),  # bytes wrap round, as is wanted
                f"{module}.weight_scale": weight.scales.float(),
            }
        return {
            f"{module}.weight_packed": bit_stream.pack(weight.codes, self.bits),
            f"{module}.weight_scale": to_float16(weight.scales, module),
            f"{module}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }

    def decode(self, module: str, load: Load) -> QuantizedTensor:
        codes = self._integer_codes(module, load) if self.layout == INTEGER else self._packed_codes(module, load)
        out_features, in_features = codes.shape
        scales = load_as(load, f"{module}.weight_scale", (out_features, None), None)
        index = load_as(load, f"{module}.weight_g_idx", (in_features,), torch.int32) if self.group_index else None
        groups = scales.shape[1]
        if index is None and in_features % groups:
            raise InputError(f"{module}.weight_scale has {groups} groups, which do not divide {in_features} inputs")
        if index is not None and not 0 <= int(index.min()) <= int(index.max()) < groups:
            raise InputError(f"{module}.weight_g_idx names groups that are not among the {groups} of its scales")
        return QuantizedTensor(codes, scales, None, index, self.bits, self.activations).plain_order()

    def _integer_codes(self, module: str, load: Load) -> Tensor:
        stored = load_as(load, f"{module}.weight", (None, None), torch.int8)
        if int(stored.min()) < -(1 << (self.bits - 1)) or int(stored.max()) >= 1 << (self.bits - 1):
            raise InputError(f"{module}.weight holds codes that do not fit into {self.bits} bits")
        return stored.view(torch.uint8) + (1 << (self.bits - 1))  # wraps round, as bytes do

    def _packed_codes(self, module: str, load: Load) -> Tensor:
        out_features, in_features = load_as(load, f"{module}.weight_shape", (2,), torch.int64).tolist()
        words = bit_stream.words_for(in_features, self.bits)
        packed = load_as(load, f"{module}.weight_packed", (out_features, words), torch.int32)
        return bit_stream.unpack(packed, self.bits, in_features)
