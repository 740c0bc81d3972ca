"""Quantizes the output layer, which calibration does not see: it is rounded to nearest."""

import torch

from llmopt.model.source import HEAD
from llmopt.quant.methods.base import ModuleReport
from llmopt.quant.methods.rtn import RoundToNearest, round_in_parts
from llmopt.weights.quantized import QuantizedTensor, Weight
from llmopt.weights.scheme import Scheme


def round_head(weight: Weight, scheme: Scheme) -> tuple[QuantizedTensor, ModuleReport]:
    """The nearest codes of a head [vocabulary, hidden], and its report, whose error is that of the weights alone.

    The vocabulary may be so large that only some of its rows fit into memory in float32.
    """
    parts: list[QuantizedTensor] = []
    loss = whole = 0.0
    for part, quantized in round_in_parts(weight, scheme):
        parts.append(quantized)
        loss += float(quantized.dequantize().sub_(part).square_().sum())
        whole += float(part.square().sum())
    report = ModuleReport(HEAD.removesuffix(".weight"), RoundToNearest.name, loss / max(whole, 1e-30))
    return _joined(parts), report


def _joined(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Runs of rows of one matrix of integer codes as one."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantizedTensor(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),  # type: ignore[misc]
        zeros=torch.cat(zeros) if zeros else None,
        group_index=None,
        bits=parts[0].bits,
    )
