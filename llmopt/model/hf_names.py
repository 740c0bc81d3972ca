"""Between the names of tensors in Hugging Face checkpoints and those that are used everywhere else in llmopt.

Everywhere else, each linear layer is a parameter of its own, and experts are named as in Qwen3-MoE:
`model.layers.0.mlp.experts.5.gate_proj.weight`. Checkpoints of some families hold several of these as one tensor, or
under other names.
"""

import re
from collections.abc import Callable, Container
from dataclasses import dataclass

from llmopt.model.architectures import Architecture
from llmopt.model.config import ModelConfig

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Tensors that hold several linear layers, outputs side by side."""
PREFIXES = ("", "language_model.", "model.language_model.")
"""What stands before the names of a decoder that is one part of a model; the last takes the place of `model.`."""
_PATTERN = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"(mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")


@dataclass(frozen=True)
class Place:
    """Where a checkpoint holds a parameter.

    Attributes:
        tensor: the name of the tensor.
        rows: those of it that are the parameter, of `of` in all; None where all are.
        expert: where the tensor is that of all experts in a stack, this one's number.
    """

    tensor: str
    rows: slice | None = None
    of: int = 0
    expert: int | None = None


def written(name: str, architecture: Architecture) -> tuple[str, tuple[str, ...]]:
    """The tensor that a checkpoint of this family holds a parameter in, and the names of all parameters in it."""
    match = _PATTERN.fullmatch(name)
    if match is None:
        return name, (name,)
    layer, module, kind = match.groups()
    for fused, members in FUSED.items():
        if architecture.fused and module in members:
            return f"model.layers.{layer}.{fused}.{kind}", tuple(f"model.layers.{layer}.{m}.{kind}" for m in members)
    if module.startswith("mlp."):
        for ours, theirs in architecture.renamed.items():
            module = module.replace(ours, theirs, 1)
    return f"model.layers.{layer}.{module}.{kind}", (name,)


def place(name: str, architecture: Architecture, config: ModelConfig, holds: Callable[[str], bool]) -> Place:
    """Where a parameter is in a checkpoint, or would be; `holds` says whether there is a tensor, quantized or not."""
    tensor, members = written(name, architecture)
    if len(members) > 1:
        return Place(tensor, *_rows(name, members, config))
    possible = (Place(tensor), _stack(name, config), Place(name))
    return next((found for found in possible if found is not None and holds(found.tensor)), Place(tensor))


def _rows(name: str, members: tuple[str, ...], config: ModelConfig) -> tuple[slice, int]:
    """The rows of a parameter in the tensor that holds all members, and how many rows that has."""
    _, _, layer, _ = name.split(".", 3)
    shapes = config.layer_shapes(int(layer))
    rows = [shapes[member.split(".", 3)[3]][0] for member in members]
    start = sum(rows[: members.index(name)])
    return slice(start, start + rows[members.index(name)]), sum(rows)


def _stack(name: str, config: ModelConfig) -> Place | None:
    """Where transformers 5 keeps a layer of an expert in memory, and some checkpoints too: gate and up of all experts
    as one tensor [experts, 2 * inner, hidden], down as [experts, hidden, inner]."""
    match = _PATTERN.fullmatch(name)
    expert = match and _EXPERT.fullmatch(match[2])
    if match is None or expert is None or config.experts is None:
        return None
    stem, number, module = f"model.layers.{match[1]}.{expert[1]}", int(expert[2]), expert[3]
    if module == "down_proj":
        return Place(f"{stem}.down_proj", expert=number)
    inner = config.experts.intermediate_size
    rows = slice(0, inner) if module == "gate_proj" else slice(inner, 2 * inner)
    return Place(f"{stem}.gate_up_proj", rows, 2 * inner, number)


def prefix(names: Container[str]) -> str:
    """What stands before the names of the decoder's tensors in a checkpoint of a larger model; nothing else."""
    return next((prefix for prefix in PREFIXES if prefixed(prefix, "model.embed_tokens.weight") in names), "")


def prefixed(prefix: str, name: str) -> str:
    """The name of the decoder's tensor in the larger model."""
    return name.replace("model.", prefix, 1) if prefix.startswith("model.") else f"{prefix}{name}"
