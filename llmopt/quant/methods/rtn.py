"""Round to nearest: each group's range is covered, each weight takes the nearest code. Needs no data."""

import torch
from torch import Tensor

from llmopt.model.decoder import LINEAR_GROUPS
from llmopt.quant.grid import Grid, fit_grid, grouped
from llmopt.quant.methods.base import InputStatistics, LayerResult, Method, ModuleReport, relative_error
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import Scheme


class RoundToNearest(Method):
    name = "rtn"
    needs_calibration = False

    def quantize_layer(
        self, weights: dict[str, Tensor], scheme: Scheme, statistics: dict[str, InputStatistics], skip: frozenset[str]
    ) -> LayerResult:
        result = LayerResult(dict(weights))
        for module in (module for group in LINEAR_GROUPS.values() for module in group if module not in skip):
            weight = weights[f"{module}.weight"]
            quantized = round_to_nearest(weight, scheme)
            result.weights[f"{module}.weight"] = quantized
            result.modules.append(ModuleReport(module, self.name, relative_error(weight, quantized, None)))
        return result


def round_to_nearest(weight: Tensor, scheme: Scheme, grid: Grid | None = None) -> QuantizedTensor:
    """The nearest codes of a weight [out, in] on the given grid, by default the one that covers its range."""
    groups = grouped(weight.float(), scheme)
    grid = grid or fit_grid(groups, scheme)
    return from_codes(grid.codes(groups).flatten(1), grid, scheme)


def from_codes(codes: Tensor, grid: Grid, scheme: Scheme, group_index: Tensor | None = None) -> QuantizedTensor:
    """The canonical form of whole-number codes [out, in] on a grid."""
    return QuantizedTensor(
        codes=codes.to(torch.uint8),
        scales=grid.scale.half(),
        zeros=None if scheme.symmetric else grid.zero.to(torch.uint8),
        group_index=group_index,
        bits=scheme.bits,
        activations=scheme.activations,
    )
