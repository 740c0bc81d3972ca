"""AWQ: scale up the inputs that matter before rounding, and fold the inverse into what comes before.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978. The
search needs no forward passes: the output error of a linear layer is tr(D G Dᵀ), with D the error of its weight and G
the gram matrix of its inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.model.decoder import LINEAR_GROUPS
from llmopt.quant.grid import Grid, best_of, fit_grid, grouped
from llmopt.quant.methods.base import InputStatistics, LayerResult, Method, ModuleReport, relative_error
from llmopt.quant.methods.rtn import round_to_nearest
from llmopt.weights.scheme import Scheme

RATIOS = 20
CLIP_STEPS = 10
LEAST_CLIP = 0.55
UNCLIPPED = ("self_attn.q_proj", "self_attn.k_proj")  # their errors multiply each other in the attention scores


@dataclass(frozen=True)
class _Fold:
    """Where the inverse of a group's input scales goes: parameters whose rows (or elements) are that input."""

    group: str
    absorbers: tuple[str, ...]


class AWQ(Method):
    name = "awq"
    needs_calibration = True

    def quantize_layer(
        self, weights: dict[str, Tensor], scheme: Scheme, statistics: dict[str, InputStatistics], skip: frozenset[str]
    ) -> LayerResult:
        scaled = dict(weights)
        grams = {group: seen.gram for group, seen in statistics.items()}
        for fold in _folds(weights, skip):
            members = [f"{module}.weight" for module in LINEAR_GROUPS[fold.group]]
            scales = _search_scales(torch.cat([scaled[m] for m in members]), scheme, statistics[fold.group])
            for member in members:
                scaled[member] = scaled[member] * scales
            for absorber in fold.absorbers:
                scaled[absorber] = scaled[absorber] / (scales[:, None] if scaled[absorber].dim() == 2 else scales)
            grams[fold.group] = grams[fold.group] / scales / scales[:, None]
        result = LayerResult(dict(scaled))
        for group, modules in LINEAR_GROUPS.items():
            for module in modules:
                if module in skip:
                    continue
                weight = scaled[f"{module}.weight"]
                grid = None if module in UNCLIPPED else _search_clip(weight, scheme, grams[group])
                quantized = round_to_nearest(weight, scheme, grid)
                result.weights[f"{module}.weight"] = quantized
                result.modules.append(ModuleReport(module, self.name, relative_error(weight, quantized, grams[group])))
        return result


def _folds(weights: dict[str, Tensor], skip: frozenset[str]) -> list[_Fold]:
    """The groups whose input can be scaled: what makes that input must absorb the inverse without changing it.

    The input of the output projection is the values', head by head, so it folds only where every query head has a
    value head of its own; under grouped queries one value head feeds several and cannot take several scales.
    """
    folds = [_Fold("qkv", ("input_layernorm.weight",)), _Fold("gate_up", ("post_attention_layernorm.weight",))]
    up = ["mlp.up_proj.weight", *(["mlp.up_proj.bias"] if "mlp.up_proj.bias" in weights else [])]
    folds.append(_Fold("down", tuple(up)))
    if weights["self_attn.v_proj.weight"].shape[0] == weights["self_attn.o_proj.weight"].shape[1]:
        bias = ["self_attn.v_proj.bias"] if "self_attn.v_proj.bias" in weights else []
        folds.insert(1, _Fold("output", ("self_attn.v_proj.weight", *bias)))
    # A layer that is to stay as it is neither has its input scaled nor absorbs another's scales.
    return [fold for fold in folds if not skip.intersection(LINEAR_GROUPS[fold.group] + _modules_of(fold.absorbers))]


def _modules_of(parameters: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(parameter.rpartition(".")[0] for parameter in parameters)


def _search_scales(weight: Tensor, scheme: Scheme, statistics: InputStatistics) -> Tensor:
    """float32 [in]: the input scales, x̄^r / w̄^(1 − r) for the best of 20 ratios r, normalised around
    1; or all ones, where none is better."""
    activation = (statistics.magnitude / max(statistics.tokens, 1)).clamp(min=1e-8)
    magnitudes = grouped(weight.abs(), scheme)
    typical = (magnitudes / magnitudes.amax(-1, keepdim=True).clamp(min=1e-8)).flatten(1).mean(0)
    best_loss, best = torch.inf, torch.ones_like(activation)
    for step in range(-1, RATIOS):
        ratio = step / RATIOS
        scales = (activation**ratio / (typical ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        scales = torch.ones_like(activation) if step < 0 else scales / (scales.max() * scales.min()).sqrt()
        groups = grouped(weight * scales, scheme)
        grid = fit_grid(groups, scheme)
        difference = grid.values(grid.codes(groups)).flatten(1) / scales - weight
        loss = float((difference @ statistics.gram * difference).sum())
        if loss < best_loss:
            best_loss, best = loss, scales
    return best


def _search_clip(weight: Tensor, scheme: Scheme, gram: Tensor) -> Grid:
    """The grid whose ranges are clipped where that lowers the error of each group's own share of the output."""
    groups = grouped(weight, scheme)
    size = groups.shape[2]
    own = torch.stack([gram[i : i + size, i : i + size] for i in range(0, gram.shape[0], size)])  # [groups, n, n]
    candidates = []
    for step in range(CLIP_STEPS):
        clip = 1 - (1 - LEAST_CLIP) * step / CLIP_STEPS
        low, high = groups.amin(-1, keepdim=True) * clip, groups.amax(-1, keepdim=True) * clip
        clipped = groups.clamp(low, high)
        grid = fit_grid(clipped, scheme)
        difference = grid.values(grid.codes(clipped)) - groups
        candidates.append((grid, (torch.einsum("ogi,gij->ogj", difference, own) * difference).sum(-1)))
    return best_of(candidates)
