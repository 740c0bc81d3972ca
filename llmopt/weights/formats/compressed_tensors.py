"""The compressed-tensors checkpoint, as llm-compressor writes it and vLLM and transformers read it.

Its settings are groups of modules, each with the settings of its weights and a layout of its own; the layouts are in
`compressed_layouts.py`.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from llmopt.errors import InputError
from llmopt.weights.formats.base import HEAD, Format, Load, Settings, parse_settings
from llmopt.weights.formats.compressed_layouts import LAYOUTS, MXFP4, NVFP4, Floats, Integers, Layout, PackedIntegers
from llmopt.weights.formats.patterns import check_names, is_named
from llmopt.weights.numbers import INT
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import PER_CHANNEL, Scheme

EVERY_LINEAR = "Linear"
MIXED = "mixed-precision"
_LAYOUT_OF: dict[str, type[Layout]] = {
    "w4a16": PackedIntegers,
    "w8a16": PackedIntegers,
    "w8a8": Integers,
    "fp8": Floats,
    "nvfp4": NVFP4,
    "mxfp4": MXFP4,
}
_LayoutName = Literal[
    "pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
    "naive-quantized",
]  # fmt: skip


class _Weights(Settings):
    num_bits: int
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Literal["channel", "group", "tensor_group", "tensor"]
    group_size: int | None = None
    dynamic: Literal[False] = False
    actorder: Literal["group", "weight", "static", True, False] | None = None


class _Activations(Settings):
    num_bits: Literal[8]
    type: Literal["int", "float"] = "int"
    symmetric: Literal[True] = True
    strategy: Literal["token"]
    dynamic: Literal[True]


class _Group(Settings):
    targets: list[str]
    weights: _Weights
    input_activations: _Activations | None = None
    output_activations: None = None
    format: _LayoutName | None = None


class _Sparsity(Settings):
    format: Literal["dense"] = "dense"


class _Config(Settings):
    config_groups: dict[str, _Group]
    format: _LayoutName | Literal["mixed-precision"] = "pack-quantized"
    quantization_status: Literal["compressed"] = "compressed"
    ignore: list[str] | None = None
    kv_cache_scheme: None = None
    sparsity_config: _Sparsity | None = None
    transform_config: dict[Any, Any] | None = None


@dataclass(frozen=True)
class ModuleGroup:
    """Modules with the same settings.

    Attributes:
        targets: their full names, patterns after `re:`, or `Linear` for every linear layer.
    """

    layout: Layout
    targets: tuple[str, ...] = (EVERY_LINEAR,)


@dataclass(frozen=True)
class CompressedTensors(Format):
    """A compressed-tensors checkpoint's settings.

    Attributes:
        groups: modules by their settings.
        ignore: modules that stay dense, by name or by pattern after `re:`.
    """

    name: ClassVar[str] = "compressed-tensors"
    schemes: ClassVar[tuple[str, ...]] = tuple(_LAYOUT_OF)

    groups: tuple[ModuleGroup, ...]
    ignore: tuple[str, ...] = (HEAD,)

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], desc_act: bool = False, damp: float | None = None) -> Self:
        """Several schemes are told apart by full names alone.

        vLLM runs query, key and value, and gate and up, as one layer each. It finds the full names of such a layer's
        parts, but would see `Linear`, in another group, before them. The head is no part of one, and is always named:
        to vLLM and SGLang its class is no linear layer.
        """
        quantized, ignore = cls.split(schemes)
        if desc_act:
            raise InputError("compressed-tensors stores no group index, so --desc-act cannot be written to it")
        targets: dict[Layout, tuple[str, ...]] = {}
        for module, scheme in quantized.items():
            layout = _layout_for(scheme)
            targets[layout] = (*targets.get(layout, ()), module)
        if len({_layout_for(scheme) for module, scheme in quantized.items() if module != HEAD}) == 1:
            targets = {layout: _every_linear(modules) for layout, modules in targets.items()}
        return cls(tuple(ModuleGroup(layout, modules) for layout, modules in targets.items()), ignore)

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        read = parse_settings(_Config, config, cls.name)
        if not read.config_groups:
            raise InputError(f"quantization_config of {cls.name} has 0 config_groups; at least one is needed")
        if read.transform_config:
            raise InputError(f"quantization_config of {cls.name} has a transform_config, which is not supported")
        groups = [
            ModuleGroup(_layout_of(group, name, read.format), tuple(group.targets))
            for name, group in read.config_groups.items()
        ]
        check_names([name for group in groups for name in group.targets])
        check_names(read.ignore or ())
        return cls(tuple(groups), tuple(read.ignore or ()))

    def config(self) -> dict[str, Any]:
        formats = {group.layout.name for group in self.groups}
        return {
            "quant_method": self.name,
            "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "ignore": list(self.ignore),
            "config_groups": {f"group_{i}": _group_config(group) for i, group in enumerate(self.groups)},
        }

    def holds(self, module: str, names: Container[str]) -> bool:
        return f"{module}.weight_scale" in names

    def encode(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        layout = self.layout(module)
        layout.check(module, weight)
        return layout.encode(module, weight)

    def decode(self, module: str, load: Load) -> QuantizedTensor:
        return self.layout(module).decode(module, load)

    def shape(self, module: str, load: Load) -> tuple[int, int]:
        return self.layout(module).shape(module, load)

    def layout(self, module: str) -> Layout:
        """The settings of a module; names go before patterns, and both before `Linear`, as in compressed-tensors.

        Raises InputError where they say that it stays dense, or nothing.
        """
        if is_named(module, self.ignore):
            raise InputError(f"quantization_config of {self.name}: {module} is quantized, but `ignore` names it")
        found = (
            next((group for group in self.groups if module in group.targets), None)
            or next((group for group in self.groups if is_named(module, group.targets)), None)
            or next((group for group in self.groups if EVERY_LINEAR in group.targets), None)
        )
        if found is None:
            raise InputError(f"quantization_config of {self.name}: {module} is quantized, but no group targets it")
        return found.layout


def _every_linear(modules: tuple[str, ...]) -> tuple[str, ...]:
    """The targets of a group that holds these modules, and all linear layers if it holds any."""
    return tuple(dict.fromkeys(module if module == HEAD else EVERY_LINEAR for module in modules))


def _layout_for(scheme: Scheme) -> Layout:
    """The settings to write a scheme with; its group size is settled."""
    kind, size = _LAYOUT_OF[scheme.name], scheme.group_size or PER_CHANNEL
    strategy = "channel" if size == PER_CHANNEL else kind.group_strategy
    return kind(scheme.bits, strategy, size, scheme.activations)


def _layout_of(group: _Group, name: str, format: str) -> Layout:
    """The settings of a group. Raises InputError where they do not go together, or with the layout's name."""
    where, weights = f"quantization_config of {CompressedTensors.name}, config_groups.{name}", group.weights
    layout = group.format or format
    if layout == "naive-quantized":  # its name where the settings alone say what it is
        layout = Integers.name if weights.type == "int" else Floats.name
    if layout not in LAYOUTS:
        raise InputError(f"{where}: the whole is {layout}, and the group has no format that says what it is")
    kind = LAYOUTS[layout]
    grouped = weights.strategy in ("group", "tensor_group")
    size = (weights.group_size or 0) if grouped else PER_CHANNEL
    if grouped and size < 1:
        raise InputError(f"{where} has groups without a positive group_size")
    checks = {
        "type": (weights.type == "int") == (kind.number == INT),
        "num_bits": weights.num_bits in kind.widths,
        "strategy": weights.strategy in kind.strategies,
        "group_size": kind.group_sizes is None or size in kind.group_sizes,
        "symmetric": weights.symmetric or kind is PackedIntegers,
    }
    for field, right in checks.items():
        if not right:
            raise InputError(f"{where}: weights.{field} is {getattr(weights, field)!r}, which {layout} does not hold")
    activations = (
        None if group.input_activations is None else "int8" if group.input_activations.type == "int" else "fp8"
    )
    indexed = kind is PackedIntegers and weights.actorder in ("group", True)
    return kind(weights.num_bits, weights.strategy, size, activations, weights.symmetric, indexed)


def _group_config(group: ModuleGroup) -> dict[str, Any]:
    layout = group.layout
    weights = {
        "num_bits": layout.bits,
        "type": "int" if layout.number == INT else "float",
        "symmetric": layout.symmetric,
        "strategy": layout.strategy,
        "group_size": None if layout.group_size == PER_CHANNEL else layout.group_size,
        "dynamic": False,
        **({"actorder": "group"} if layout.group_index else {}),
    }
    activations = {
        "num_bits": 8,
        "type": "int" if layout.activations == "int8" else "float",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    return {
        "targets": list(group.targets),
        "weights": weights,
        "input_activations": activations if layout.activations else None,
        "output_activations": None,
        "format": layout.name,
    }
