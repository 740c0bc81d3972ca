"""What a quantization method is given and what it gives back."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmopt.backend.gram import GramSum, add_gram
from llmopt.model.decoder import linear_groups
from llmopt.weights.quantized import QuantizedTensor, Weight
from llmopt.weights.scheme import Scheme


class InputStatistics:
    """What calibration saw at the input of some linear layers.

    Attributes:
        gram: float32 [in, in], the sum of x xᵀ over all tokens; None where only its diagonal is kept.
        energy: float32 [in], the sum of x², gram's diagonal.
        rows: float32 [at most `keep_rows`, in], some of the inputs themselves, spread over the calls.
        peak: float32 [in], the largest |x| of all inputs, where rows are kept.
        tokens: how many tokens were seen.
    """

    def __init__(self, width: int, with_gram: bool = True, keep_rows: int = 0) -> None:
        self.gram = torch.zeros(width, width) if with_gram else None
        self.energy = torch.zeros(width) if self.gram is None else self.gram.diagonal()
        self.rows, self.peak = torch.empty(0, width), torch.zeros(width)
        self.keep_rows = keep_rows
        self.tokens = 0

    def add(self, x: Tensor, add_gram: GramSum = add_gram) -> None:
        """Take in the inputs [tokens, in] of one call."""
        x = x.float()
        if self.gram is not None:
            add_gram(self.gram, x)
        else:
            self.energy += x.square().sum(0).to(self.energy.device)
        if self.keep_rows:
            self._keep(x)
        self.tokens += x.shape[0]

    def importance(self) -> Tensor | None:
        """float32 [in]: the mean square of each input; None where none were seen, as of an expert that no token of
        the calibration was sent to."""
        return self.energy / self.tokens if self.tokens else None

    def scaled(self, factors: Tensor) -> "InputStatistics":
        """What would have been seen of inputs times `factors` [in]."""
        scaled = InputStatistics(len(factors), with_gram=False, keep_rows=self.keep_rows)
        scaled.energy = self.energy * factors.square()
        scaled.gram = None if self.gram is None else self.gram * factors * factors[:, None]
        scaled.rows, scaled.peak, scaled.tokens = self.rows * factors, self.peak * factors, self.tokens
        return scaled

    def full_gram(self) -> Tensor:
        """The gram matrix. Raises ValueError where it was not kept."""
        if self.gram is None:
            raise ValueError("these statistics were gathered without a gram matrix")
        return self.gram

    def _keep(self, x: Tensor) -> None:
        """Every so many rows of what has come so far, thinned out whenever they become too many."""
        self.peak = torch.maximum(self.peak, x.abs().amax(0).to(self.peak.device))
        self.rows = torch.cat((self.rows, x[:: max(1, x.shape[0] // self.keep_rows)].to(self.rows.device)))
        if len(self.rows) > self.keep_rows:
            self.rows = self.rows[torch.linspace(0, len(self.rows) - 1, self.keep_rows).long()]


@dataclass
class ModuleReport:
    """How one linear layer came out: its relative error and, where the method failed on it, what was done instead."""

    name: str
    method: str
    error: float
    fallback: str | None = None


@dataclass
class LayerResult:
    """A decoder layer's parameters after quantization, by name, and a report for each linear layer."""

    weights: dict[str, Weight]
    modules: list[ModuleReport] = field(default_factory=list)


@dataclass(frozen=True)
class Stack:
    """Linear layers that share their input and their scheme, as one matrix.

    Attributes:
        group: their key in `linear_groups`.
        modules: their names, in order.
        weight: float32 [sum of outputs, in].
    """

    group: str
    modules: tuple[str, ...]
    scheme: Scheme
    weight: Tensor
    rows: tuple[int, ...]

    def split(self, quantized: QuantizedTensor) -> Iterator[tuple[str, Tensor, QuantizedTensor]]:
        """Each module's name, weight and quantized weight."""
        for module, part in zip(self.modules, torch.arange(len(self.weight)).split(self.rows), strict=True):
            yield module, self.weight[part], quantized.select_rows(part)


def stacks(weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme]) -> Iterator[Stack]:
    """The linear layers that have a scheme, those together that can be."""
    for group, members in linear_groups(weights).items():
        by_scheme: dict[Scheme, list[str]] = {}
        for module in members:
            if module in schemes:
                by_scheme.setdefault(schemes[module], []).append(module)
        for scheme, modules in by_scheme.items():
            parts = [weights[f"{module}.weight"] for module in modules]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            yield Stack(group, tuple(modules), scheme, whole, tuple(len(part) for part in parts))


class Method(ABC):
    """Chooses codes for the linear layers of one decoder layer.

    Attributes:
        needs_calibration: it cannot do without statistics.
        needs_gram: of what calibration sees it needs the whole gram matrix, not only the diagonal.
        keep_rows: and so many of the inputs themselves.
    """

    name: str
    needs_calibration: bool
    needs_gram = True
    keep_rows = 0

    @abstractmethod
    def quantize_layer(
        self, weights: dict[str, Tensor], schemes: Mapping[str, Scheme], statistics: dict[str, InputStatistics]
    ) -> LayerResult:
        """Quantize a layer.

        Args:
            weights: its parameters in float32, by their names within the layer; not changed.
            schemes: for each linear layer to quantize, by its name within the layer, its scheme with the group size
                settled; the others stay as they are.
            statistics: for each key of `linear_groups`, what calibration saw there; empty without calibration.
        """


def relative_error(weight: Tensor, quantized: QuantizedTensor, statistics: InputStatistics | None) -> float:
    """‖(W − Ŵ)X‖² / ‖WX‖² over the inputs X that were seen; without any, the same of the weights alone.

    Where only the energies of the inputs are known, they are taken as uncorrelated.
    """
    difference = quantized.dequantize() - weight
    if statistics is None or not statistics.tokens:
        return float(difference.square().sum() / weight.square().sum().clamp(min=1e-30))
    if statistics.gram is None:
        loss, whole = ((w.square() * statistics.energy).sum() for w in (difference, weight))
    else:
        loss, whole = ((w @ statistics.gram).mul_(w).sum() for w in (difference, weight))
    return float(loss / whole.clamp(min=1e-30))
