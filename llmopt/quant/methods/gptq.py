"""GPTQ: round column by column, and let the columns that are left make up for each error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323. Columns are always taken in the order of falling activation energy, the diagonal of the Hessian. With
`desc_act` the groups follow that order too, and the file needs a group index; without, groups stay runs of neighbours
with scales fixed beforehand, so that any runtime reads the result in plain order.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from llmopt.quant.fit import fit_grid
from llmopt.quant.grid import Grid, group_size_of, grouped
from llmopt.quant.methods.base import InputStatistics, LayerResult, Method, ModuleReport, relative_error, stacks
from llmopt.quant.methods.rtn import round_to_nearest
from llmopt.weights.numbers import rounded
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import Scheme

logger = logging.getLogger(__name__)

BLOCK = 128  # columns after which the rest of the matrix is brought up to date
INVERSE_BLOCK = 512  # columns of the inverse computed together
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
        self, weights: dict[str, Tensor], schemes: Mapping[str, Scheme], statistics: dict[str, InputStatistics]
    ) -> LayerResult:
        result = LayerResult(dict(weights))
        for group, alike in groupby(stacks(weights, schemes), key=lambda stack: stack.group):
            seen = statistics[group]
            hessian, fallback = self._factorise(seen.full_gram())
            for stack in alike:
                if hessian is None:
                    quantized = round_to_nearest(stack.weight, stack.scheme, importance=seen.importance())
                else:
                    quantized = gptq(stack.weight, hessian, stack.scheme, self.desc_act)
                for module, weight, part in stack.split(quantized):
                    result.weights[f"{module}.weight"] = part
                    name = self.name if hessian is not None else "rtn"
                    result.modules.append(ModuleReport(module, name, relative_error(weight, part, seen), fallback))
        return result

    def _factorise(self, gram: Tensor) -> tuple["Hessian | None", str | None]:
        """Layers that share an input share its Hessian. Also says what had to be done about it, if anything."""
        for step in DAMPING_STEPS:
            damping = self.damping * step
            try:
                return Hessian(gram, damping), None if step == 1 else f"damped by {damping:g} of the mean diagonal"
            except torch.linalg.LinAlgError:
                logger.info("damping %g does not make the Hessian positive definite", damping)
        return None, "rounded to nearest: the Hessian is not positive definite"


class Hessian:
    """The Hessian of a layer's output error, factorised.

    Attributes:
        energy: float32 [in], its diagonal before damping.
        dead: bool [in], inputs that were never seen.
        order: int64 [in], inputs in the order of falling energy.
        factor: float32 [in, in] upper triangular U with Uᵀ U = H⁻¹, inputs in that order.
    """

    def __init__(self, gram: Tensor, damping: float) -> None:
        """Raises torch.linalg.LinAlgError where the damped matrix is not positive definite."""
        self.energy = gram.diagonal().clone()
        self.dead = self.energy == 0
        self.energy[self.dead] = 1
        self.order = self.energy.argsort(descending=True, stable=True)
        # Read backwards, H has a Cholesky factor that is upper triangular, H = R Rᵀ; its inverse is U. Everything is
        # done in place, because for a wide layer each copy is hundreds of megabytes.
        backwards = self.order.flip(0)
        damped = gram[backwards][:, backwards]
        damped.diagonal().copy_(self.energy[backwards] + damping * self.energy.mean())
        torch.linalg.cholesky(damped, out=damped)
        self.factor = _inverse_of_triangle(damped).flip(0, 1)


def _inverse_of_triangle(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, block column by block column, in the memory of the matrix.

    The inverse of [[A, 0], [B, C]] is [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]]; taken from the last block column to the first,
    C⁻¹ stands already where C stood.
    """
    size = len(lower)
    for start in reversed(range(0, size, INVERSE_BLOCK)):
        stop = min(start + INVERSE_BLOCK, size)
        own = torch.linalg.solve_triangular(lower[start:stop, start:stop], torch.eye(stop - start), upper=False)
        lower[stop:, start:stop] = -(lower[stop:, stop:] @ (lower[stop:, start:stop] @ own))
        lower[start:stop, start:stop] = own
    return lower


def gptq(weight: Tensor, hessian: Hessian, scheme: Scheme, desc_act: bool) -> QuantizedTensor:
    """Quantize a weight [out, in] given the Hessian of its inputs."""
    weight = weight.masked_fill(hessian.dead, 0)  # an input that was never seen may be anything; zero costs nothing
    order = hessian.order
    group_size = group_size_of(scheme, weight.shape[1])
    column_group = torch.arange(weight.shape[1]) // group_size
    ordered = weight.T[order].contiguous()
    if desc_act:
        importance = hessian.energy[order].reshape(-1, group_size)
        numbers, grid = _round_inputs(ordered, hessian.factor, column_group, _Growing(scheme, importance, ordered))
    else:
        importance = hessian.energy.reshape(-1, group_size)
        fixed = fit_grid(grouped(weight, scheme), scheme, importance, GRID_STEPS)
        column_group = column_group[order]
        numbers, grid = _round_inputs(ordered, hessian.factor, column_group, _Fixed(fixed))
    inverse = order.argsort()
    return grid.quantized(numbers[inverse].T, column_group[inverse].int() if desc_act else None)


class _Fixed:
    """A grid that stands before the loop begins; scale and zero are [groups, out], so that a group's lie together."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.scheme = grid.scheme
        self.scale, self.zero = grid.scale.T.contiguous(), grid.zero.T.contiguous()

    def enter(self, group: int, current: Callable[[int], Tensor]) -> None:
        """Called before each input, with its group, and a function that gives the group's weights as they are now."""

    def finish(self) -> Grid:
        return self.grid


class _Growing(_Fixed):
    """Each group's grid is fitted when its first input comes, to the weights as they are by then."""

    def __init__(self, scheme: Scheme, importance: Tensor, ordered: Tensor) -> None:
        self.scheme = scheme
        self.importance = importance
        self.scale, self.zero = torch.empty(2, len(importance), ordered.shape[1]).unbind()
        self.fitted = -1

    def enter(self, group: int, current: Callable[[int], Tensor]) -> None:
        if group == self.fitted:
            return
        self.fitted = group
        weights = current(self.importance.shape[1])
        found = fit_grid(weights, self.scheme, self.importance[group, None], GRID_STEPS)
        self.scale[group], self.zero[group] = found.scale[:, 0], found.zero[:, 0]

    def finish(self) -> Grid:
        zeros = None if self.scheme.symmetric else self.zero.T.contiguous()
        return Grid(self.scheme, self.scale.T.half().contiguous(), zeros)


def _round_inputs(weight: Tensor, factor: Tensor, input_group: Tensor, grid: _Fixed) -> tuple[Tensor, Grid]:
    """The loop of the paper over inputs that are already in order; numbers float32 [in, out] and their grid.

    The weight is [in, out], so that the outputs of one input lie side by side, and is used up. `factor` is that of
    `Hessian`.
    """
    inputs, outputs = weight.shape
    numbers = torch.empty_like(weight)
    scheme, groups = grid.scheme, input_group.tolist()
    diagonal = factor.diagonal().tolist()
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = torch.empty(stop - start, outputs)
        for i in range(start, stop):
            group = groups[i]
            grid.enter(group, partial(_upcoming, weight, factor, errors, start, i))
            scale, zero = grid.scale[group], grid.zero[group]
            number = torch.addcdiv(zero, weight[i], scale, out=numbers[i])
            rounded(number, scheme.number, scheme.largest_code)
            value = (number - zero).mul_(scale)
            torch.sub(weight[i], value, out=errors[i - start]).div_(diagonal[i])
            weight[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
        weight[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return numbers, grid.finish()


def _upcoming(weight: Tensor, factor: Tensor, errors: Tensor, start: int, first: int, count: int) -> Tensor:
    """The `count` inputs from `first` on, [out, 1, count], with the errors of this block taken into account."""
    current = weight[first : first + count].clone()
    stop = min(start + BLOCK, len(weight))
    if first + count > stop and first > start:  # the part beyond the block has not been brought up to date
        current[stop - first :] -= factor[start:first, stop : first + count].T @ errors[: first - start]
    return current.T.contiguous()[:, None]
