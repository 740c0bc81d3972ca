"""AWQ: scale up the inputs that matter before rounding, and fold the inverse into what comes before.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978. The
search needs no forward passes: the output error of a linear layer is tr(D G Dᵀ), with D the error of its weight and G
the gram matrix of its inputs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmopt.quant.fit import best_of, fit_grid
from llmopt.quant.grid import Grid, grouped
from llmopt.quant.methods.base import (
    InputStatistics,
    LayerResult,
    Method,
    ModuleReport,
    Stack,
    relative_error,
    stacks,
)
from llmopt.quant.methods.folding import Fold, folds, why_unscaled
from llmopt.quant.methods.rtn import round_to_nearest
from llmopt.weights.scheme import Scheme

RATIOS = 20
CLIP_STEPS = 10
LEAST_CLIP = 0.55
UNCLIPPED = ("self_attn.q_proj", "self_attn.k_proj")  # their errors multiply each other in the attention scores


class AWQ(Method):
    """Attributes:
    head_dim: the length of an attention head, by which the output projection's inputs are told apart.
    norm_offset: that of `ModelConfig`.
    """

    name = "awq"
    needs_calibration = True

    def __init__(self, head_dim: int, norm_offset: float = 0.0) -> None:
        self.head_dim = head_dim
        self.norm_offset = norm_offset

    def quantize_layer(
        self, weights: dict[str, Tensor], schemes: Mapping[str, Scheme], statistics: dict[str, InputStatistics]
    ) -> LayerResult:
        scaled = dict(weights)
        for fold in folds(weights, schemes, self.head_dim, self.norm_offset):
            members = [stack for stack in stacks(scaled, schemes) if stack.group == fold.group]
            scales = _search_scales(members, fold, statistics[fold.group])
            fold.apply(scaled, scales)
            statistics = statistics | {fold.group: statistics[fold.group].scaled(1 / fold.spread(scales))}
        result = LayerResult(dict(scaled))
        for stack in stacks(scaled, schemes):
            seen = statistics[stack.group]
            grid = _search_clip(stack, seen.full_gram())
            for module, weight, part in stack.split(round_to_nearest(stack.weight, stack.scheme, grid)):
                result.weights[f"{module}.weight"] = part
                error = relative_error(weight, part, seen)
                result.modules.append(ModuleReport(module, self.name, error, why_unscaled(module)))
        return result


def _search_scales(members: list[Stack], fold: Fold, statistics: InputStatistics) -> Tensor:
    """float32 [distinct inputs]: the input scales, x̄^r / w̄^(1 − r) for the best of 20 ratios r, normalised around
    1; or all ones, where none is better. x̄ is the root mean square, which the gram matrix holds already, where the
    paper takes the mean magnitude."""
    importance = statistics.importance()
    if importance is None:
        return torch.ones_like(fold.shared(statistics.energy))
    activation = fold.shared(importance.sqrt()).clamp(min=1e-8)
    magnitude = torch.cat([_typical(stack) for stack in members]).mean(0)
    typical = fold.shared(magnitude)
    best_loss, best = torch.inf, torch.ones_like(activation)
    for step in range(-1, RATIOS):
        ratio = step / RATIOS
        scales = (activation**ratio / (typical ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        scales = torch.ones_like(activation) if step < 0 else scales / (scales.max() * scales.min()).sqrt()
        loss = sum(_loss(stack, fold.spread(scales), statistics.full_gram()) for stack in members)
        if loss < best_loss:
            best_loss, best = loss, scales
    return best


def _typical(stack: Stack) -> Tensor:
    """float32 [out, in]: the magnitude of each weight as a share of its group's largest."""
    magnitudes = grouped(stack.weight.abs(), stack.scheme)
    return (magnitudes / magnitudes.amax(-1, keepdim=True).clamp(min=1e-8)).flatten(1)


def _loss(stack: Stack, scales: Tensor, gram: Tensor) -> float:
    """The output error of a weight that is rounded with its inputs scaled."""
    groups = grouped(stack.weight * scales, stack.scheme)
    difference = fit_grid(groups, stack.scheme).errors(groups).flatten(1).div_(scales)
    return float((difference @ gram).mul_(difference).sum())


def _search_clip(stack: Stack, gram: Tensor) -> Grid:
    """The grid whose ranges are clipped where that lowers the error of each group's own share of the output."""
    groups = grouped(stack.weight, stack.scheme)
    size = groups.shape[2]
    own = torch.stack([gram[i : i + size, i : i + size] for i in range(0, gram.shape[0], size)])  # [groups, n, n]
    clippable = torch.tensor([m not in UNCLIPPED for m in stack.modules]).repeat_interleave(torch.tensor(stack.rows))
    candidates = []
    for step in range(CLIP_STEPS):
        clip = 1 - (1 - LEAST_CLIP) * step / CLIP_STEPS
        low, high = groups.amin(-1, keepdim=True) * clip, groups.amax(-1, keepdim=True) * clip
        grid = fit_grid(groups.clamp(low, high), stack.scheme)
        difference = grid.errors(groups)
        loss = (torch.einsum("ogi,gij->ogj", difference, own) * difference).sum(-1)
        if step:
            loss[~clippable] = torch.inf
        candidates.append(((grid.scale, grid.zero), loss))
    scale, zero = best_of(candidates)
    return Grid(stack.scheme, scale.half(), None if stack.scheme.symmetric else zero)
