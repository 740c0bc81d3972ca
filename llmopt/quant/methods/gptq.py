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
                error = relative_error(stacked[part], quantized.select_rows(part), seen.gram)
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
    codes, grid = _round_inputs(
        weight.T[order].contiguous(), _inverse_factor(hessian), column_group, scheme, grid, importance
    )
    inverse = order.argsort()
    group_index = column_group[inverse].int() if desc_act else None
    return from_codes(codes[inverse].T, grid, scheme, group_index)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with Uᵀ U = H⁻¹, without forming the inverse.

    Read backwards, H has a Cholesky factor that is upper triangular, H = R Rᵀ; its inverse is U. Raises
    torch.linalg.LinAlgError where H is not positive definite.
    """
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(hessian)), upper=True)


def _round_inputs(
    weight: Tensor, factor: Tensor, input_group: Tensor, scheme: Scheme, fixed: Grid | None, importance: Tensor
) -> tuple[Tensor, Grid]:
    """The loop of the paper over inputs that are already in order; codes float32 [in, out] and their grid.

    The weight is [in, out], so that the outputs of one input lie side by side. `factor` is that of
    `_inverse_factor`. Without a fixed grid each group's is fitted when its first input comes, to the weights as they
    are by then.
    """
    inputs, outputs = weight.shape
    codes = torch.empty_like(weight)
    group_size = group_size_of(scheme, inputs)
    scale, zero = (fixed.scale.T, fixed.zero.T) if fixed is not None else torch.empty(2, inputs // group_size, outputs)
    scale, zero, largest_code = scale.contiguous(), zero.contiguous(), (1 << scheme.bits) - 1
    groups = input_group.tolist()
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = torch.empty(stop - start, outputs)
        for i in range(start, stop):
            group = groups[i]
            if fixed is None and i % group_size == 0:
                current = _current_group(weight, factor, errors, start, i, group_size)
                fitted = fit_grid(current, scheme, importance[group, None], GRID_STEPS)
                scale[group], zero[group] = fitted.scale[:, 0], fitted.zero[:, 0]
            torch.addcdiv(zero[group], weight[i], scale[group], out=codes[i]).round_().clamp_(0, largest_code)
            value = (codes[i] - zero[group]).mul_(scale[group])
            torch.sub(weight[i], value, out=errors[i - start]).div_(factor[i, i])
            weight[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
        weight[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes, Grid(scale.T.contiguous(), zero.T.contiguous(), largest_code)


def _current_group(weight: Tensor, factor: Tensor, errors: Tensor, start: int, first: int, group_size: int) -> Tensor:
    """The group that begins with input `first`, [out, 1, group size], with this block's errors taken into account."""
    current = weight[first : first + group_size].clone()
    stop = min(start + BLOCK, len(weight))
    if first + group_size > stop and first > start:  # the part beyond the block has not been brought up to date
        current[stop - first :] -= factor[start:first, stop : first + group_size].T @ errors[: first - start]
    return current.T[:, None]
