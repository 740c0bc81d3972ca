"""What a quantization method is given and what it gives back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmopt.weights.quantized import QuantizedTensor, Weight
from llmopt.weights.scheme import Scheme


class InputStatistics:
    """What calibration saw at the input of some linear layers.

    Attributes:
        gram: float32 [in, in], the sum of x xᵀ over all tokens.
        magnitude: float32 [in], the sum of |x|.
        tokens: how many tokens were seen.
    """

    def __init__(self, width: int) -> None:
        self.gram = torch.zeros(width, width)
        self.magnitude = torch.zeros(width)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in the inputs [tokens, in] of one call."""
        x = x.float()
        if x.device == self.gram.device:
            self.gram.addmm_(x.T, x)
        else:
            self.gram += (x.T @ x).to(self.gram.device)
        self.magnitude += x.abs().sum(0).to(self.magnitude.device)
        self.tokens += x.shape[0]


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


class Method(ABC):
    """Chooses codes for the linear layers of one decoder layer."""

    name: str
    needs_calibration: bool

    @abstractmethod
    def quantize_layer(
        self, weights: dict[str, Tensor], scheme: Scheme, statistics: dict[str, InputStatistics], skip: frozenset[str]
    ) -> LayerResult:
        """Quantize a layer.

        Args:
            weights: its parameters in float32, by their names within the layer; not changed.
            scheme: with its group size settled.
            statistics: for each key of `LINEAR_GROUPS`, what calibration saw there; empty without calibration.
            skip: linear layers to leave as they are, by name.
        """


def relative_error(weight: Tensor, quantized: QuantizedTensor, gram: Tensor | None) -> float:
    """‖(W − Ŵ)X‖² / ‖WX‖² over the inputs X of this gram matrix; without any, the same of the weights alone."""
    difference = quantized.dequantize() - weight
    if gram is None:
        return float(difference.square().sum() / weight.square().sum().clamp(min=1e-30))
    loss = (difference @ gram * difference).sum()
    return float(loss / (weight @ gram * weight).sum().clamp(min=1e-30))
