"""Scaling the inputs of a linear layer, and folding the inverse into what makes those inputs.

The function of the layer stays what it was; what changes is which weights and activations are large. AWQ and
SmoothQuant differ only in how they choose the scales.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from llmopt.model.decoder import linear_groups


@dataclass(frozen=True)
class Fold:
    """One input that can be scaled.

    Attributes:
        group: its key in `linear_groups`.
        modules: the linear layers that take that input.
        absorbers: parameters whose rows (or elements) are that input, which take the inverse.
        offset: what is added to the absorbers before they multiply, of norms that do.
        sharing: how many query heads read each value head; those must share their scales.
        head_dim: the length of a head, where `sharing` is more than 1.
    """

    group: str
    modules: tuple[str, ...]
    absorbers: tuple[str, ...]
    offset: float = 0.0
    sharing: int = 1
    head_dim: int = 1

    def shared(self, figures: Tensor) -> Tensor:
        """The mean of positive figures [in] over the inputs that must share a scale: [distinct inputs]."""
        return figures.view(-1, self.sharing, self.head_dim).mean(1).flatten()

    def spread(self, scales: Tensor) -> Tensor:
        """Scales [distinct inputs] for every input: [in]."""
        return scales.view(-1, 1, self.head_dim).expand(-1, self.sharing, -1).flatten()

    def apply(self, weights: dict[str, Tensor], scales: Tensor) -> None:
        """In `weights`, multiply the group's columns by `scales` [distinct inputs] and divide the absorbers by them."""
        for module in self.modules:
            weights[f"{module}.weight"] = weights[f"{module}.weight"] * self.spread(scales)
        for name in self.absorbers:
            divisor = scales[:, None] if weights[name].dim() == 2 else scales
            weights[name] = (weights[name] + self.offset) / divisor - self.offset


def folds(
    weights: dict[str, Tensor], quantized: Collection[str], head_dim: int, norm_offset: float = 0.0
) -> list[Fold]:
    """The inputs that can be scaled.

    The input of the output projection is made of the values', head by head. Under grouped queries one value head feeds
    several query heads, whose inputs then share their scales. A layer that is not to be quantized neither has its
    input scaled nor absorbs another's scales. `norm_offset` is that of `ModelConfig`.

    Where there are experts, all of them and the router share the norm's output. Scales that suit one would not suit
    another, so that input stays as it is; what an expert makes of it is scaled like that of an MLP.
    """
    groups = linear_groups(weights)
    sharing = weights["self_attn.o_proj.weight"].shape[1] // weights["self_attn.v_proj.weight"].shape[0]
    values = _with_bias(weights, "self_attn.v_proj")
    found = [
        Fold("qkv", groups["qkv"], ("input_layernorm.weight",), norm_offset),
        Fold("output", groups["output"], values, sharing=sharing, head_dim=head_dim),
    ]
    if "gate_up" in groups:
        before = "pre_feedforward_layernorm.weight"  # where it is there, the other norm comes after attention
        norm = before if before in weights else "post_attention_layernorm.weight"
        found.append(Fold("gate_up", groups["gate_up"], (norm,), norm_offset))
    for group, members in groups.items():
        if group.endswith("down"):
            found.append(Fold(group, members, _with_bias(weights, members[0].replace("down_proj", "up_proj"))))
    return [fold for fold in found if all(module in quantized for module in _linear_layers(fold))]


def why_unscaled(module: str) -> str | None:
    """Why there is no fold for the input of a linear layer; None where there is one, or could be."""
    if ".experts." in module and not module.endswith("down_proj"):
        return "its inputs are not scaled, because all experts and the router share them"
    return None


def _with_bias(weights: dict[str, Tensor], module: str) -> tuple[str, ...]:
    return tuple(name for name in (f"{module}.weight", f"{module}.bias") if name in weights)


def _linear_layers(fold: Fold) -> list[str]:
    absorbing = [name.rpartition(".")[0] for name in fold.absorbers]
    return [*fold.modules, *(module for module in absorbing if not module.endswith("layernorm"))]
