"""SmoothQuant: move the difficulty of rounding activations into the weights, input by input.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438. Where the paper takes one migration strength for a model, here each input takes the one with the
least error of the layer's output on some of the calibration's own inputs, rounded as they will be at run time.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmopt.backend.reference import round_activations
from llmopt.quant.methods.base import InputStatistics, LayerResult, Method, Stack, stacks
from llmopt.quant.methods.folding import Fold, folds, why_unscaled
from llmopt.quant.methods.rtn import RoundToNearest, round_to_nearest
from llmopt.weights.scheme import Scheme

STRENGTHS = tuple(step / 20 for step in range(4, 20))
KEEP_ROWS = 512  # inputs on which a strength is judged


class SmoothQuant(Method):
    """Attributes:
    head_dim: the length of an attention head, by which the output projection's inputs are told apart.
    norm_offset: that of `ModelConfig`.
    """

    name = "smoothquant"
    needs_calibration = True
    needs_gram = False
    keep_rows = KEEP_ROWS

    def __init__(self, head_dim: int, norm_offset: float = 0.0) -> None:
        self.head_dim = head_dim
        self.norm_offset = norm_offset

    def quantize_layer(
        self, weights: dict[str, Tensor], schemes: Mapping[str, Scheme], statistics: dict[str, InputStatistics]
    ) -> LayerResult:
        smoothed = dict(weights)
        for fold in folds(weights, schemes, self.head_dim, self.norm_offset):
            members = [stack for stack in stacks(smoothed, schemes) if stack.group == fold.group]
            scales = _search_scales(members, fold, statistics[fold.group])
            fold.apply(smoothed, scales)
            statistics = statistics | {fold.group: statistics[fold.group].scaled(1 / fold.spread(scales))}
        result = RoundToNearest().quantize_layer(smoothed, schemes, statistics)
        for module in result.modules:
            module.method, module.fallback = self.name, why_unscaled(module.name)
        return result


def _search_scales(members: list[Stack], fold: Fold, statistics: InputStatistics) -> Tensor:
    """float32 [distinct inputs]: max|x|^α / max|w|^(1 − α) for the best strength α; or ones, where none is better."""
    activation = fold.shared(statistics.peak).clamp(min=1e-5)
    weight = fold.shared(torch.cat([stack.weight.abs() for stack in members]).amax(0)).clamp(min=1e-5)
    candidates = [torch.ones_like(activation)]
    candidates += [activation**strength / weight ** (1 - strength) for strength in STRENGTHS]
    candidates = [scales / scales.log().mean().exp() for scales in candidates]
    losses = [sum(_loss(stack, fold.spread(scales), statistics.rows) for stack in members) for scales in candidates]
    return candidates[losses.index(min(losses))]


def _loss(stack: Stack, scales: Tensor, rows: Tensor) -> float:
    """The output error with activations and weights rounded."""
    weight = round_to_nearest(stack.weight * scales, stack.scheme).dequantize()
    x = rows / scales
    if stack.scheme.activations is not None:
        x = round_activations(x, stack.scheme.activations)
    return float((x @ weight.T - rows @ stack.weight.T).square().sum())
