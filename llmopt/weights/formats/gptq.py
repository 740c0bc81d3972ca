"""The GPTQ checkpoint, as auto-gptq and GPTQModel write it.

For a module of I inputs and O outputs in G groups, in codes of b bits:

    qweight  int32    [I * b / 32, O]   codes, packed along the inputs, lowest bits first
    qzeros   int32    [G, O * b / 32]   zero points, packed along the outputs
    scales   float16  [G, O]
    g_idx    int32    [I]               the group of each input

Version 1 stores each zero point less one, so that it cannot say 0; version 2 stores the zero point itself. Symmetric
checkpoints are written in version 1, which everything reads, and those with asymmetric modules in version 2.

Modules may differ in their settings, by GPTQModel's `dynamic`: patterns of module names, of which the first that
matches counts. One after `-:` leaves its modules dense; any other, with or without `+:`, gives them settings.
"""

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from re import escape
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from llmopt.errors import InputError, LlmoptError
from llmopt.weights.formats import bits as bit_stream
from llmopt.weights.formats.base import (
    HEAD,
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
from llmopt.weights.formats.patterns import compiled
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import PER_CHANNEL, Scheme

V1, V2 = "gptq", "gptq_v2"
SKIP, OVERRIDE = "-:", "+:"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What vLLM runs as one layer, and matches patterns with by that layer's name."""


class _Override(Settings):
    bits: Literal[2, 3, 4, 8] | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    sym: bool | None = None


class _Config(Settings):
    bits: Literal[2, 3, 4, 8]
    group_size: int
    desc_act: bool = False
    sym: bool = True
    damp_percent: float | None = None
    lm_head: bool | None = None
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = None
    format: Literal["gptq", "gptq_v2"] | None = None  # GPTQModel's newer name of checkpoint_format
    pack_dtype: Literal["int32"] = "int32"
    is_marlin_format: Literal[False] = False
    dynamic: dict[str, _Override] | None = None


@dataclass(frozen=True)
class Rule:
    """What holds for the modules whose names a pattern matches from their beginning.

    Attributes:
        skip: they stay dense.
        bits, group_size, desc_act, sym: settings of their own, None for those of the whole checkpoint.
    """

    pattern: str
    skip: bool = False
    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    sym: bool | None = None

    def settings(self) -> dict[str, int | bool]:
        """Those that are its own, by their names."""
        own = {"bits": self.bits, "group_size": self.group_size, "desc_act": self.desc_act, "sym": self.sym}
        return {name: value for name, value in own.items() if value is not None}


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
        rules: where modules differ from all this; the first that matches counts.
        lm_head: whether the head is quantized too.
    """

    name: ClassVar[str] = "gptq"
    schemes: ClassVar[tuple[str, ...]] = tuple(f"w{bits}a16{kind}" for bits in (2, 3, 4, 8) for kind in ("", "-asym"))

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    version: str
    damp: float | None = None
    rules: tuple[Rule, ...] = ()
    lm_head: bool = False

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], desc_act: bool = False, damp: float | None = None) -> Self:
        """What most modules share is said for all; the others have rules."""
        quantized, dense = cls.split(schemes)
        usual, _ = Counter(quantized.values()).most_common(1)[0]
        rules = [Rule(pattern, skip=True) for pattern in _patterns(module for module in dense if module != HEAD)]
        for scheme in dict.fromkeys(quantized.values()):
            if scheme != usual:
                own = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
                rules += [Rule(pattern, **own) for pattern in _patterns(m for m, s in quantized.items() if s == scheme)]  # type: ignore[arg-type]
        version = V1 if all(scheme.symmetric for scheme in quantized.values()) else V2
        size = usual.group_size or PER_CHANNEL
        return cls(usual.bits, size, desc_act, usual.symmetric, version, damp, tuple(rules), HEAD in quantized)

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        read = parse_settings(_Config, config, cls.name)
        rules = []
        for key, override in (read.dynamic or {}).items():
            pattern = key.removeprefix(SKIP).removeprefix(OVERRIDE)
            compiled(pattern)
            settings = {} if key.startswith(SKIP) else override.model_dump()
            rules.append(Rule(pattern, key.startswith(SKIP), **settings))
        for size in (read.group_size, *(rule.group_size for rule in rules if rule.group_size is not None)):
            if size != PER_CHANNEL and size < 1:
                raise InputError(f"quantization_config of gptq: group_size is {size}, not positive or -1")
        version = read.checkpoint_format or read.format or V1
        own = (read.bits, read.group_size, read.desc_act, read.sym, version, read.damp_percent)
        return cls(*own, tuple(rules), bool(read.lm_head))

    def config(self) -> dict[str, Any]:
        dynamic = {f"{SKIP if rule.skip else OVERRIDE}{rule.pattern}": rule.settings() for rule in self.rules}
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.sym,
            **({} if self.damp is None else {"damp_percent": self.damp}),
            "static_groups": False,
            "true_sequential": True,
            "lm_head": self.lm_head,
            "checkpoint_format": self.version,
            "format": self.version,
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
        }

    def settings(self, module: str) -> "GPTQ":
        """The settings of one module, without rules. Raises InputError where it is to stay dense."""
        rule = next((rule for rule in self.rules if compiled(rule.pattern).match(module)), None)
        if rule is None:
            return replace(self, rules=())
        if rule.skip:
            raise InputError(f"quantization_config of gptq: {module} is quantized, but {rule.pattern!r} leaves it out")
        return replace(self, rules=(), **rule.settings())  # type: ignore[arg-type]

    def holds(self, module: str, names: Container[str]) -> bool:
        return f"{module}.qweight" in names

    def encode(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        own = self.settings(module)
        expect(module, weight, own.bits, own.sym, own.group_size)
        if weight.group_index is not None and not own.desc_act:
            raise LlmoptError(f"{module} has a group index, which readers only heed with desc_act")
        if any(length * own.bits % bit_stream.WORD for length in weight.shape):
            raise LlmoptError(
                f"{module} is {list(weight.shape)}, which codes of {own.bits} bits do not pack into words"
            )
        zeros = zero_points(module, weight)
        if own.version == V1:
            if zeros.min() < 1:
                raise LlmoptError(f"{module}: version 1 of GPTQ cannot hold a zero point of 0")
            zeros = zeros - 1
        return {
            f"{module}.qweight": bit_stream.pack(weight.codes, own.bits).T.contiguous(),
            f"{module}.qzeros": bit_stream.pack(zeros.T, own.bits),
            f"{module}.scales": to_float16(weight.scales, module).T.contiguous(),
            f"{module}.g_idx": weight.groups().int(),
        }

    def decode(self, module: str, load: Load) -> QuantizedTensor:
        """Where version 1 stores the largest code, its zero point is one above it, as in auto-gptq's kernels."""
        own = self.settings(module)
        packed = load_as(load, f"{module}.qweight", (None, None), torch.int32)
        out_features = packed.shape[1]
        in_features = packed.shape[0] * bit_stream.WORD // own.bits
        scales = load_scales(load, f"{module}.scales", (None, out_features))
        groups = scales.shape[0]
        words = bit_stream.words_for(out_features, own.bits)
        stored = load_as(load, f"{module}.qzeros", (groups, words), torch.int32)
        group_index = load_as(load, f"{module}.g_idx", (in_features,), torch.int32)
        if not 0 <= int(group_index.min()) <= int(group_index.max()) < groups:
            raise InputError(f"{module}.g_idx names groups that are not among the {groups} of {module}.scales")
        zeros = bit_stream.unpack(stored, own.bits, out_features).T.contiguous()
        if own.version == V1:
            if zeros.max() == 255:
                raise InputError(f"{module}.qzeros holds a zero point of 256, which 8-bit codes cannot have")
            zeros = zeros + 1
        is_middle = own.sym and bool((zeros == 1 << (own.bits - 1)).all())
        return QuantizedTensor(
            bit_stream.unpack(packed.T.contiguous(), own.bits, in_features),
            scales.T.contiguous(),
            None if is_middle else zeros,
            group_index,
            own.bits,
        ).plain_order()

    def shape(self, module: str, load: Load) -> tuple[int, int]:
        packed = load_as(load, f"{module}.qweight", (None, None), torch.int32)
        return packed.shape[1], packed.shape[0] * bit_stream.WORD // self.settings(module).bits


def _patterns(modules: Iterable[str]) -> list[str]:
    """Patterns that match these modules and no others, and the layers that vLLM makes of several of them."""
    patterns = []
    left = dict.fromkeys(modules)
    while left:
        parent, dot, leaf = next(iter(left)).rpartition(".")
        fused = next((fused for fused, parts in FUSED.items() if leaf in parts), leaf)
        parts = FUSED.get(fused, (leaf,))
        if fused == leaf or any(f"{parent}{dot}{part}" not in left for part in parts):
            parts, last = (leaf,), escape(leaf)
        else:
            last = f"({'|'.join((*parts, fused))})"
        patterns.append(f"^{escape(parent + dot)}{last}$")
        for part in parts:
            del left[f"{parent}{dot}{part}"]
    return patterns
