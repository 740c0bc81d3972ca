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

from llmopt.backend.select import multiplier
from llmopt.quant.fit import fit_grid
from llmopt.quant.grid import Grid, group_size_of, grouped
from llmopt.quant.methods.base import InputStatistics, LayerResult, Method, ModuleReport, relative_error, stacks
from llmopt.quant.methods.rtn import round_to_nearest
from llmopt.weights.numbers import INT, rounded
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import Scheme

logger = logging.getLogger(__name__)

BLOCK = 128  # inputs after which the rest of the matrix is brought up to date
INVERSE_BLOCK = 512  # columns of the inverse computed together
GRID_STEPS = 20
INPUTS_PER_TOKEN = 4  # of an expert, at most; with fewer tokens it is rounded to nearest
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
            too_few = _too_few(group, seen)
            hessian, fallback = self._factorise(seen.full_gram()) if too_few is None else (None, too_few)
            importance = seen.importance() if too_few is None else None
            for stack in alike:
                if hessian is None:
                    quantized = round_to_nearest(stack.weight, stack.scheme, importance=importance)
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


def _too_few(group: str, seen: InputStatistics) -> str | None:
    """Why a Hessian would say nothing, where an expert was sent too few tokens; None where there are enough.

    The errors that GPTQ moves about are judged by the inputs that were seen. From fewer than a fraction of the
    inputs' number, it would learn these tokens by heart.
    """
    least = -(-len(seen.energy) // INPUTS_PER_TOKEN)
    if not group.startswith("experts.") or seen.tokens >= least:
        return None
    return f"rounded to nearest: of the calibration {seen.tokens} tokens came to this expert, {least} are needed"


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
        start: _Fixed = _Growing(scheme, importance, len(weight))
    else:
        importance = hessian.energy.reshape(-1, group_size)
        start = _Fixed(fit_grid(grouped(weight, scheme), scheme, importance, GRID_STEPS), column_group[order])
    numbers, grid = _round_all(ordered, hessian.factor, start)
    inverse = order.argsort()
    return grid.quantized(numbers[inverse].T, column_group[inverse].int() if desc_act else None)


class _Fixed:
    """A grid that stands before the loop begins; scale and zero are [groups, out], so that a group's lie together."""

    def __init__(self, grid: Grid, group_of_input: Tensor) -> None:
        self.grid = grid
        self.scheme = grid.scheme
        self.group_of_input = group_of_input
        self.scale, self.zero = grid.scale.T.contiguous(), grid.zero.T.contiguous()

    def ready(self, first: int, stop: int, current: Callable[[int], Tensor]) -> int:
        """The input before which all from `first` on have their grid, at most `stop`; `current` gives the weights
        [in, out] of the next so many inputs as they are now."""
        return stop

    def finish(self) -> Grid:
        return self.grid


class _Growing(_Fixed):
    """Each group's grid is fitted when its first input comes, to the weights as they are by then."""

    def __init__(self, scheme: Scheme, importance: Tensor, outputs: int) -> None:
        self.scheme = scheme
        self.importance = importance
        groups, self.size = importance.shape
        self.group_of_input = torch.arange(groups).repeat_interleave(self.size)
        self.scale, self.zero = torch.empty(2, groups, outputs).unbind()

    def ready(self, first: int, stop: int, current: Callable[[int], Tensor]) -> int:
        group, place = divmod(first, self.size)
        if place == 0:
            weights = current(self.size).T.contiguous()[:, None]
            found = fit_grid(weights, self.scheme, self.importance[group, None], GRID_STEPS)
            self.scale[group], self.zero[group] = found.scale[:, 0], found.zero[:, 0]
        return min(stop, (group + 1) * self.size)

    def finish(self) -> Grid:
        zeros = None if self.scheme.symmetric else self.zero.T.contiguous()
        return Grid(self.scheme, self.scale.T.half().contiguous(), zeros)


def _round_all(weight: Tensor, factor: Tensor, grid: _Fixed) -> tuple[Tensor, Grid]:
    """The loop of the paper over inputs that are already in order; numbers float32 [in, out] and their grid.

    The weight is [in, out], so that the outputs of one input lie side by side, and is used up. `factor` is that of
    `Hessian`.
    """
    inputs, outputs = weight.shape
    numbers, errors = torch.empty_like(weight), torch.empty(BLOCK, outputs)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        first = start
        while first < stop:
            last = grid.ready(first, stop, partial(_upcoming, weight, factor, errors, start, first))
            round_inputs(weight, factor, grid, numbers, errors, start, first, last)
            first = last
        weight[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return numbers, grid.finish()


def _upcoming(weight: Tensor, factor: Tensor, errors: Tensor, start: int, first: int, count: int) -> Tensor:
    """The `count` inputs [in, out] from `first` on, in their block or beyond, less what its errors so far take away."""
    owed = factor[start:first, first : first + count].T @ errors[: first - start]
    return weight[first : first + count] - owed


def round_inputs(
    weight: Tensor, factor: Tensor, grid: _Fixed, numbers: Tensor, errors: Tensor, start: int, first: int, last: int
) -> None:
    """Rounds the inputs from `first` to `last` of the block that begins at `start`, one by one: each after what the
    errors of those before it in the block take from it. Writes their numbers, and their errors [place in block, out].
    """
    scheme = grid.scheme
    kernels = multiplier() if scheme.number == INT else None
    if kernels is not None:
        arrays = weight, factor, grid.group_of_input, grid.scale, grid.zero, numbers, errors
        kernels.round_inputs(*arrays, start, first, last, scheme.largest_code)
        return
    for i in range(first, last):
        group = grid.group_of_input[i]
        scale, zero = grid.scale[group], grid.zero[group]
        own = weight[i] - factor[start:i, i] @ errors[: i - start]
        number = torch.addcdiv(zero, own, scale, out=numbers[i])
        rounded(number, scheme.number, scheme.largest_code)
        torch.sub(own, (number - zero).mul_(scale), out=errors[i - start]).div_(factor[i, i])
