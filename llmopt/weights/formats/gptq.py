"""The GPTQ checkpoint, as auto-gptq and GPTQModel write it.

For a module of I inputs and O outputs in G groups, in codes of b bits:

    qweight  int32    [I * b / 32, O]   codes, packed along the inputs, lowest bits first
    qzeros   int32    [G, O * b / 32]   zero points, packed along the outputs
    scales   float16  [G, O]
    g_idx    int32    [I]               the group of each input

Version 1 stores each zero point less one, so that it cannot say 0; version 2 stores the zero point itself. Symmetric
checkpoints are written in version 1, which everything reads, and asymmetric ones in version 2.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from re import escape
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
    zero_points,
)
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import PER_CHANNEL, Scheme

V1, V2 = "gptq", "gptq_v2"


class _Config(Settings):
    bits: Literal[2, 3, 4, 8]
    group_size: int
    desc_act: bool = False
    sym: bool = True
    damp_percent: float | None = None
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = None
    format: Literal["gptq", "gptq_v2"] | None = None  # GPTQModel's newer name of checkpoint_format
    pack_dtype: Literal["int32"] = "int32"
    is_marlin_format: Literal[False] = False
    dynamic: dict[str, Any] | None = None


@dataclass(frozen=True)
class GPTQ(Format):
    """A GPTQ checkpoint's settings, by the names of its config.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: -1 for one group a row.
        desc_act: groups follow the order in which inputs were quantized, so that g_idx matters.
        sym: every zero point is the middle code.
        version: `gptq` (zero points less one) or `gptq_v2`.
        damp: the share of the mean diagonal that was added to the Hessian, for the record.
        ignore: modules that stay dense.
    """

    name: ClassVar[str] = "gptq"
    schemes: ClassVar[tuple[str, ...]] = ("w4a16", "w4a16-asym", "w8a16")

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    version: str
    damp: float | None = None
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
        if scheme.group_size is None:
            raise ValueError("the group size is not settled")
        version = V1 if scheme.symmetric else V2
        return cls(scheme.bits, scheme.group_size, desc_act, scheme.symmetric, version, damp, tuple(ignore))

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        read = parse_settings(_Config, config, cls.name)
        if read.group_size != PER_CHANNEL and read.group_size < 1:
            raise InputError(f"quantization_config of gptq: group_size is {read.group_size}, not positive or -1")
        overrides = [pattern for pattern in read.dynamic or {} if not pattern.startswith("-:")]
        if overrides:
            raise InputError(f"quantization_config of gptq: dynamic gives {overrides[0]!r} settings of its own, "
                             "which is not supported; only the patterns of modules to skip are")  # fmt: skip
        version = read.checkpoint_format or read.format or V1
        return cls(read.bits, read.group_size, read.desc_act, read.sym, version, read.damp_percent)

    def config(self) -> dict[str, Any]:
        skipped: dict[str, dict] = {f"-:^{escape(module)}$": {} for module in self.ignore if module != "lm_head"}
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.sym,
            **({} if self.damp is None else {"damp_percent": self.damp}),
            "static_groups": False,
            "true_sequential": True,
            "lm_head": "lm_head" not in self.ignore,
            "checkpoint_format": self.version,
            "format": self.version,
            "pack_dtype": "int32",
            **({"dynamic": skipped} if skipped else {}),
        }

    def holds(self, module: str, names: Container[str]) -> bool:
        return f"{module}.qweight" in names

    def encode(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        expect(module, weight, self.bits, self.sym, None if self.group_size == PER_CHANNEL else self.group_size)
        if weight.group_index is not None and not self.desc_act:
            raise LlmoptError(f"{module} has a group index, which readers only heed with desc_act")
        if any(length * self.bits % bit_stream.WORD for length in weight.shape):
            raise LlmoptError(
                f"{module} is {list(weight.shape)}, which codes of {self.bits} bits do not pack into words"
            )
        zeros = zero_points(module, weight)
        if self.version == V1:
            if zeros.min() < 1:
                raise LlmoptError(f"{module}: version 1 of GPTQ cannot hold a zero point of 0")
            zeros = zeros - 1
        return {
            f"{module}.qweight": bit_stream.pack(weight.codes, self.bits).T.contiguous(),
            f"{module}.qzeros": bit_stream.pack(zeros.T, self.bits),
            f"{module}.scales": to_float16(weight.scales, module).T.contiguous(),
            f"{module}.g_idx": weight.groups().int(),
        }

    def decode(self, module: str, load: Load) -> QuantizedTensor:
        """Where version 1 stores the largest code, its zero point is one above it, as in auto-gptq's kernels."""
        packed = load_as(load, f"{module}.qweight", (None, None), torch.int32)
        out_features = packed.shape[1]
        in_features = packed.shape[0] * bit_stream.WORD // self.bits
        scales = load_as(load, f"{module}.scales", (None, out_features), None)
        groups = scales.shape[0]
        words = bit_stream.words_for(out_features, self.bits)
        stored = load_as(load, f"{module}.qzeros", (groups, words), torch.int32)
        group_index = load_as(load, f"{module}.g_idx", (in_features,), torch.int32)
        if not 0 <= int(group_index.min()) <= int(group_index.max()) < groups:
            raise InputError(f"{module}.g_idx names groups that are not among the {groups} of {module}.scales")
        zeros = bit_stream.unpack(stored, self.bits, out_features).T.contiguous()
        if self.version == V1:
            if zeros.max() == 255:
                raise InputError(f"{module}.qzeros holds a zero point of 256, which 8-bit codes cannot have")
            zeros = zeros + 1
        is_middle = self.sym and bool((zeros == 1 << (self.bits - 1)).all())
        return QuantizedTensor(
            bit_stream.unpack(packed.T.contiguous(), self.bits, in_features),
            scales.T.contiguous(),
            None if is_middle else zeros,
            group_index,
            self.bits,
        ).plain_order()
