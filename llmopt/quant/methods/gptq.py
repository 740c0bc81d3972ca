"""GPTQ: round column by column, and let the columns that are left make up for each error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323. Columns are always taken in the order of falling activation energy, the diagonal of the Hessian. With
`desc_act` the groups follow that order too, and the file needs a group index; without, groups stay runs of neighbours
with scales fixed beforehand, so that any runtime reads the result in plain order.
"""

import logging

import torch
from torch import Tensor

from llmopt.model.decoder import LINEAR_GROUPS
from llmopt.quant.grid import Grid, fit_grid, group_size_of, grouped
from llmopt.quant.methods.base import InputStatistics, LayerResult, Method, ModuleReport, relative_error
from llmopt.quant.methods.rtn import from_codes, round_to_nearest
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import Scheme

logger = logging.getLogger(__name__)

BLOCK = 128  # columns after which the rest of the matrix is brought up to date
GRID_STEPS = 20
DAMPING_STEPS = (1.0, 10.0, 100.0)  # times the damping asked for, until the Hessian can be factorised


class GPTQ(Method):
    """Attributes:
    damping: added to the Hessian's diagonal, as a share of its mean.
    desc_act: form groups in the order of falling activation energy.
    """

    name = "gptq"
    needs_calibration = True

    def __init__(self, damping: float = 0.01, desc_act: bool = False) -> None:
        self.damping = damping
        self.desc_act = desc_act

    def quantize_layer(
        self, weights: dict[str, Tensor], scheme: Scheme, statistics: dict[str, InputStatistics], skip: frozenset[str]
    ) -> LayerResult:
        result = LayerResult(dict(weights))
        for group, members in LINEAR_GROUPS.items():
            modules = [module for module in members if module not in skip]
            if not modules:
                continue
            seen = statistics[group]
            # Layers that share an input share its Hessian, so they are one matrix here.
            stacked = torch.cat([weights[f"{module}.weight"] for module in modules])
            quantized, fallback = self._quantize(stacked, scheme, seen)
            rows = [weights[f"{module}.weight"].shape[0] for module in modules]
            for module, part in zip(modules, torch.arange(len(stacked)).split(rows), strict=True):
                result.weights[f"{module}.weight"] = quantized.select_rows(part)
                error = relative_error(stacked[part], quantized.select_rows(part), seen)
                result.modules.append(ModuleReport(module, "rtn" if fallback else self.name, error, fallback))
        return result

    def _quantize(
        self, weight: Tensor, scheme: Scheme, statistics: InputStatistics
    ) -> tuple[QuantizedTensor, str | None]:
        for step in DAMPING_STEPS:
            try:
                return gptq(weight, statistics.gram, scheme, self.damping * step, self.desc_act), None
            except torch.linalg.LinAlgError:
                logger.info("damping %g does not make the Hessian positive definite", self.damping * step)
        return round_to_nearest(weight, scheme), "rounded to nearest: the Hessian is not positive definite"


def gptq(weight: Tensor, gram: Tensor, scheme: Scheme, damping: float, desc_act: bool) -> QuantizedTensor:
    """Quantize a weight [out, in] given the gram matrix [in, in] of its inputs.

    Raises torch.linalg.LinAlgError where the damped Hessian cannot be factorised.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    weight = weight.masked_fill(dead, 0)  # an input that was never seen may be anything; zero costs nothing
    diagonal[dead] = 1
    order = diagonal.argsort(descending=True, stable=True)
    group_size = group_size_of(scheme, weight.shape[1])
    column_group = torch.arange(weight.shape[1]) // group_size
    if desc_act:
        importance = diagonal[order].reshape(-1, group_size)
        grid = None
    else:
        column_group = column_group[order]
        importance = diagonal.reshape(-1, group_size)
        grid = fit_grid(grouped(weight, scheme), scheme, importance, GRID_STEPS)
    hessian = hessian[order][:, order]
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    codes, grid = _round_columns(weight[:, order], factor, column_group, scheme, grid, importance)
    inverse = order.argsort()
    group_index = column_group[inverse].int() if desc_act else None
    return from_codes(codes[:, inverse], grid, scheme, group_index)


def _round_columns(
    weight: Tensor, factor: Tensor, column_group: Tensor, scheme: Scheme, fixed: Grid | None, importance: Tensor
) -> tuple[Tensor, Grid]:
    """The loop of the paper over columns that are already in order; codes float32 [out, in] and their grid.

    `factor` is the upper Cholesky factor of the inverse Hessian. Without a fixed grid each group's is fitted when its
    first column comes, to the weights as they are by then.
    """
    weight = weight.clone()
    codes = torch.empty_like(weight)
    grids: list[Grid] = []
    group_size = group_size_of(scheme, weight.shape[1])
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        errors = torch.empty(weight.shape[0], stop - start)
        for column in range(start, stop):
            if fixed is not None:
                grid = fixed.select(column_group[column : column + 1])
            elif column % group_size == 0:
                current = _current_group(weight, factor, errors, start, column, group_size)
                grids.append(fit_grid(current, scheme, importance[column // group_size, None], GRID_STEPS))
                grid = grids[-1]
            value = weight[:, column : column + 1]
            codes[:, column : column + 1] = grid.codes(value)
            error = (value - grid.values(codes[:, column : column + 1])) / factor[column, column]
            weight[:, column + 1 : stop].addmm_(error, factor[column, None, column + 1 : stop], alpha=-1)
            errors[:, column - start] = error[:, 0]
        weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    if fixed is not None:
        return codes, fixed
    scale, zero = torch.cat([g.scale for g in grids], 1), torch.cat([g.zero for g in grids], 1)
    return codes, Grid(scale, zero, grids[0].largest_code)


def _current_group(weight: Tensor, factor: Tensor, errors: Tensor, start: int, column: int, group_size: int) -> Tensor:
    """The group that begins at `column`, [out, 1, group size], with this block's errors taken into account."""
    group = slice(column, column + group_size)
    stop = min(start + BLOCK, weight.shape[1])
    current = weight[:, group].clone()
    if column + group_size > stop and column > start:  # the part beyond the block has not been brought up to date
        beyond = slice(stop, column + group_size)
        current[:, stop - column :] -= errors[:, : column - start] @ factor[start:column, beyond]
    return current[:, None]
