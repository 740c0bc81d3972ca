"""Mixed precision: which schemes a model's linear layers may have, and which they get for a budget of bits.

What runtimes fuse (query, key and value; gate and up) stays in one scheme. Candidates are what the formats hold:

- integer schemes as wide as the one that is asked for, and wider, of the same symmetry. GPTQ and compressed-tensors
  name each module's width and group size. vLLM runs 4 and 8 bits in both, and of GPTQ also 2 and 3 bits, but not
  beside others; so these come into play only for who asks for `w2a16` or `w3a16`;
- every GGUF type as wide as the one that is asked for, and wider, whose blocks divide the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from llmopt.errors import InputError
from llmopt.model.config import ModelConfig
from llmopt.model.decoder import LINEAR_GROUPS
from llmopt.model.source import layer_name
from llmopt.quant.allocate import Choice, allocate
from llmopt.weights.formats import FORMATS
from llmopt.weights.numbers import INT
from llmopt.weights.scheme import SCHEMES, USUAL_GROUP_SIZES, Scheme

HOLDS_ONE_SCHEME = "awq"


@dataclass(frozen=True)
class Part:
    """Linear layers that share an input, and so a scheme.

    Attributes:
        layer: their decoder layer.
        group: their key in LINEAR_GROUPS.
        modules: their names within the layer; those that stay as they are, are left out.
        weights: how many, together.
        width: the length of their rows.
        schemes: what they may have, group sizes settled.
    """

    layer: int
    group: str
    modules: tuple[str, ...]
    weights: int
    width: int
    schemes: tuple[Scheme, ...]

    def sizes(self) -> list[int]:
        """Bits, scales and zero points included, in each scheme."""
        return [round(self.weights * scheme.stored_bits(self.width)) for scheme in self.schemes]


@dataclass(frozen=True)
class MixedPrecision:
    """What a budget may be spent on.

    Attributes:
        parts: every one of the model that is to be quantized; where an override names a layer, with no more than the
            scheme that it has.
        budget: bits for all of them.
    """

    parts: tuple[Part, ...]
    budget: int

    def spend(self, losses: Sequence[Sequence[float]]) -> dict[str, Any]:
        """The best that the budget buys, given the loss of each scheme of each part; JSON, as the manifest has it.

        `bpw` is the mean of a weight's bits, `kl` the sum of the losses: what is to be expected if they add up.
        """
        choices = [
            [Choice(size, loss) for size, loss in zip(part.sizes(), of_part, strict=True)]
            for part, of_part in zip(self.parts, losses, strict=True)
        ]
        taken = allocate(choices, self.budget)
        chosen = [of_part[number] for of_part, number in zip(choices, taken, strict=True)]
        weights = sum(part.weights for part in self.parts)
        groups = [
            {
                "layer": part.layer,
                "group": part.group,
                "scheme": part.schemes[number].name,
                "group_size": part.schemes[number].group_size,
                "kl": float(f"{choice.loss:.3g}"),
            }
            for part, number, choice in zip(self.parts, taken, chosen, strict=True)
        ]
        bpw, kl = sum(choice.size for choice in chosen) / weights, sum(choice.loss for choice in chosen)
        return {"bpw": round(bpw, 4), "kl": float(f"{kl:.4g}"), "groups": groups}

    def schemes(self, allocation: Mapping[str, Any]) -> dict[str, Scheme]:
        """The scheme of each linear layer, by its full name, in what `spend` gave."""
        return {
            layer_name(part.layer, module): _with_group_size(SCHEMES[group["scheme"]], group["group_size"])
            for part, group in zip(self.parts, allocation["groups"], strict=True)
            for module in part.modules
        }


def mixed_precision(
    target_bpw: float,
    main: Scheme,
    group_size: int | None,
    schemes: Mapping[str, Scheme],
    pinned: frozenset[str],
    formats: Sequence[str],
    config: ModelConfig,
) -> MixedPrecision:
    """What may be done for a mean of `target_bpw` bits a weight.

    Args:
        main: the scheme that was asked for, of which candidates are the like.
        group_size: None where candidates may have any usual one.
        schemes: of every linear layer that is to be quantized, by its full name.
        pinned: linear layers whose schemes stand.
        formats: that must hold the candidates.

    Raises InputError where there is nothing to choose from, or the budget is beyond what there is.
    """
    if HOLDS_ONE_SCHEME in formats:
        raise InputError("awq checkpoints are of one scheme: give --target-bpw with another --format, such as gptq")
    if main.number != INT or main.is_dense or main.activations is not None:
        raise InputError(f"--target-bpw mixes integer schemes, such as w4a16 or GGUF's types, not {main.name}")
    if config.experts is not None:
        raise InputError("--target-bpw does not know models with experts: give one --scheme, and overrides in a recipe")
    parts = []
    for layer in range(config.num_layers):
        for group, members in LINEAR_GROUPS.items():
            there = {module: name for module in members if (name := layer_name(layer, module)) in schemes}
            if there and pinned.isdisjoint(there.values()):
                parts.append(_part(layer, group, tuple(there), config, main, group_size, formats))
            else:  # GGUF may hold several schemes here, so that each layer is a part of its own
                parts += [_pinned_part(layer, group, module, config, schemes[name]) for module, name in there.items()]
    weights = sum(part.weights for part in parts)
    _check_target(target_bpw, parts, weights)
    return MixedPrecision(tuple(parts), int(target_bpw * weights))


def _part(
    layer: int,
    group: str,
    modules: tuple[str, ...],
    config: ModelConfig,
    main: Scheme,
    group_size: int | None,
    formats: Sequence[str],
) -> Part:
    shapes = [config.layer_shapes(layer)[f"{module}.weight"] for module in modules]
    width = shapes[0][1]
    if main.gguf_type is not None:
        schemes = [
            scheme
            for scheme in SCHEMES.values()
            if scheme.gguf_type and scheme.number == INT and not scheme.is_dense and width % scheme.row_multiple == 0
        ]
    else:
        sizes = [size for size in USUAL_GROUP_SIZES if width % size == 0] if group_size is None else [group_size]
        schemes = []
        for scheme in SCHEMES.values():
            alike = not scheme.fixed_group and scheme.number == INT and scheme.symmetric == main.symmetric
            if alike and not scheme.is_dense and all(scheme.name in FORMATS[name].schemes for name in formats):
                # Of 8 bits the largest groups alone: what smaller ones would save is next to nothing.
                schemes += [scheme.with_group_size(size) for size in (sizes[:1] if scheme.bits == 8 else sizes)]
    wide_enough = tuple(scheme for scheme in schemes if scheme.bits >= main.bits)
    return Part(layer, group, modules, sum(map(prod, shapes)), width, wide_enough)


def _pinned_part(layer: int, group: str, module: str, config: ModelConfig, scheme: Scheme) -> Part:
    shape = config.layer_shapes(layer)[f"{module}.weight"]
    return Part(layer, group, (module,), prod(shape), shape[1], (scheme,))


def _check_target(target: float, parts: Sequence[Part], weights: int) -> None:
    least, most = (sum(choose(part.sizes()) for part in parts) / weights for choose in (min, max))
    if target < least:
        raise InputError(
            f"--target-bpw {target:g} is below the {least:.3f} bits a weight, scales included, of the narrowest "
            "schemes that may be used: give more, or a narrower --scheme"
        )
    if target > most:
        raise InputError(
            f"--target-bpw {target:g} is more than the {most:.3f} bits a weight, scales included, of the widest "
            "schemes that may be used: give less, or that --scheme without --target-bpw"
        )


def _with_group_size(scheme: Scheme, group_size: int) -> Scheme:
    return scheme if scheme.fixed_group else scheme.with_group_size(group_size)
