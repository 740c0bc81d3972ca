"""Round to nearest: each group's range is covered, each weight takes the nearest code. Needs no data.

Where there is data all the same, each group's range is the one of the least error, weighted by how much energy each
input carries, as llama.cpp's importance matrix does. GGUF's types are always searched, as llama.cpp does too.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from llmopt.model.source import as_dense
from llmopt.quant.fit import fit_grid
from llmopt.quant.grid import Grid, grouped
from llmopt.quant.methods.base import InputStatistics, LayerResult, Method, ModuleReport, relative_error, stacks
from llmopt.weights.quantized import QuantizedTensor, Weight, row_parts
from llmopt.weights.scheme import Scheme

SEARCH_STEPS = 20


class RoundToNearest(Method):
    name = "rtn"
    needs_calibration = False
    needs_gram = False

    def quantize_layer(
        self, weights: dict[str, Tensor], schemes: Mapping[str, Scheme], statistics: dict[str, InputStatistics]
    ) -> LayerResult:
        result = LayerResult(dict(weights))
        for stack in stacks(weights, schemes):
            seen = statistics.get(stack.group)
            importance = None if seen is None else seen.importance()
            quantized = round_to_nearest(stack.weight, stack.scheme, importance=importance)
            for module, weight, part in stack.split(quantized):
                result.weights[f"{module}.weight"] = part
                result.modules.append(ModuleReport(module, self.name, relative_error(weight, part, seen)))
        return result


def round_to_nearest(
    weight: Tensor, scheme: Scheme, grid: Grid | None = None, importance: Tensor | None = None
) -> QuantizedTensor:
    """The nearest codes of a weight [out, in] on the given grid, else on one that covers its range, or that a search
    finds where the inputs' importance [in] is known."""
    groups = grouped(weight.float(), scheme)
    if grid is None:
        steps = SEARCH_STEPS if importance is not None or scheme.gguf_type else 1
        grid = fit_grid(groups, scheme, None if importance is None else importance.reshape(groups.shape[1:]), steps)
    return grid.quantized(grid.numbers(groups).flatten(1))


def round_in_parts(weight: Weight, scheme: Scheme) -> Iterator[tuple[Tensor, QuantizedTensor]]:
    """Some rows of a weight [out, in] in float32 and their nearest codes, one run of rows after the other, so that a
    matrix as large as an embedding is never in float32 as a whole."""
    for rows in row_parts(weight):
        part = as_dense(weight[rows] if isinstance(weight, Tensor) else weight.select_rows(rows))
        yield part, round_to_nearest(part, scheme)
