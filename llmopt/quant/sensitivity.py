"""How far a model's predictions move when each of its linear layers is quantized alone, in each of several schemes.

To second order, the divergence between the model and one whose weights W of one layer have become W + D is

    Σ KL(token) ≈ ½ E[(Σ gᵀ D x)²],   g = Jᵀ v

over the tokens of a text, where x is the layer's input, J the derivative of all logits with respect to the layer's
output at that token, and v a random vector with the covariance diag(p) − p pᵀ of the predicted probabilities p, which
is the Fisher information of the logits (Martens 2014, "New insights and perspectives on the natural gradient method",
arXiv:1412.1193). A backward pass that starts with v gives g. So one forward and one backward pass serve every layer and
every scheme, and a scheme costs one product of the inputs with D.

One random v a text would make a noisy estimate. But rounding moves one output of a layer independently of the next, so
that the square of their sum is on average the sum of their squares: a layer with a thousand outputs is a thousand
samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.backend.base import Linear
from llmopt.backend.reference import ReferenceBackend
from llmopt.model.decoder import LINEAR_GROUPS, DecoderLayer, place_norm
from llmopt.model.source import ModelSource, as_dense
from llmopt.progress import Progress, silent
from llmopt.quant.calibration import CalibrationSweep
from llmopt.quant.fit import fit_grid
from llmopt.quant.grid import grouped
from llmopt.quant.mixed_precision import Part
from llmopt.weights.quantized import QuantizedTensor, Weight
from llmopt.weights.scheme import Scheme

SAMPLES, LENGTH = 8, 256  # calibration samples that are looked at, and tokens of each
OUTPUTS = 256  # rows of a matrix that are rounded to see what it does, at most
SEARCH_STEPS = 5  # of the fit of a grid, which the methods search more finely
VOCABULARY_AT_ONCE = 8192  # rows of the head that are in floating point together


@dataclass(frozen=True)
class Trace:
    """What passed through one group of linear layers.

    Attributes:
        inputs: float32 [samples, length, in].
        gradients: float32 [samples, length, out], Jᵀv.
    """

    inputs: Tensor
    gradients: Tensor


@torch.inference_mode(False)  # which the caller may be in, and which would forbid gradients
def measure(
    source: ModelSource,
    tokens: Tensor,
    parts: Sequence[Part],
    backend: ReferenceBackend,
    seed: int = 0,
    progress: Progress = silent,
) -> list[list[float]]:
    """The divergence, in nats a token, that each scheme of each part costs while all else stays as it is.

    Weights are rounded to nearest, each input counted by its energy, which stands in for whatever method comes later.
    One decoder layer is in memory at a time, beside the inputs of all layers: float32 [layers, tokens, hidden].

    Args:
        tokens: int64 [samples, length], of which some are enough.
        seed: of the random vectors at the logits.
    """
    layers = source.config.num_layers
    some = tokens[:: max(1, len(tokens) // SAMPLES)][:SAMPLES, :LENGTH]
    sweep = CalibrationSweep(source, some, backend, with_gram=False)
    hidden = torch.cat(sweep.batches)
    inputs = []
    for index in range(layers):
        progress("following the calibration text", index, layers)
        inputs.append(hidden)
        with torch.no_grad():
            hidden = sweep.run(DecoderLayer(source.config, index, source.layer(index), backend), hidden)
    gradient = _start_backwards(source, hidden, backend, seed)
    losses: list[list[float]] = [[] for _ in parts]
    for index in reversed(range(layers)):
        progress("measuring sensitivity", layers - 1 - index, layers)
        weights = {name: as_dense(weight) for name, weight in source.layer(index).items()}
        traces, gradient = _trace(sweep, DecoderLayer(source.config, index, weights, backend), inputs.pop(), gradient)
        for part, of_part in zip(parts, losses, strict=True):
            if part.layer == index:
                of_part += [_loss(traces[part.group], weights, part, scheme) for scheme in part.schemes]
    return losses


def _loss(trace: Trace, weights: Mapping[str, Tensor], part: Part, scheme: Scheme) -> float:
    """The divergence in nats a token that a part's scheme costs.

    Where a linear layer has many outputs, every so many stand for all.
    """
    importance = trace.inputs.square().mean((0, 1))
    outputs = trace.gradients.split([len(weights[f"{module}.weight"]) for module in LINEAR_GROUPS[part.group]], dim=2)
    total = 0.0
    for module, gradients in zip(LINEAR_GROUPS[part.group], outputs, strict=True):
        if module not in part.modules:
            continue
        weight = weights[f"{module}.weight"]
        some = slice(None, None, -(-len(weight) // OUTPUTS))
        rows = grouped(weight[some], scheme)
        grid = fit_grid(rows, scheme, importance.reshape(rows.shape[1:]), SEARCH_STEPS)
        change = grid.errors(rows).flatten(1)
        effects = (trace.inputs @ change.T).mul_(gradients[..., some]).sum(1)
        total += float(effects.square().sum()) * len(weight) / len(change)
    return total / trace.inputs.shape[:2].numel() / 2


def _trace(
    sweep: CalibrationSweep, layer: DecoderLayer, hidden: Tensor, gradient: Tensor
) -> tuple[dict[str, Trace], Tensor]:
    """A layer forwards and backwards: what passes through its linear layers, and the gradient at its input.

    `hidden`, its input, and `gradient`, that at its output, are [samples, length, hidden].
    """
    watched = {group: _Watched(linear) for group, linear in layer.linears.items()}
    layer.linears.update(watched)
    hidden = hidden.clone().requires_grad_()
    output = sweep.run(layer, hidden)
    earlier, *found = torch.autograd.grad(output, [hidden, *(w.output for w in watched.values())], gradient)
    each = hidden.shape[:2]
    traces = {
        group: Trace(linear.input.cpu().unflatten(0, each), at.cpu().unflatten(0, each))
        for (group, linear), at in zip(watched.items(), found, strict=True)
    }
    return traces, earlier


class _Watched(Linear):
    """A linear operation that keeps its last input and output."""

    input: Tensor
    output: Tensor

    def __init__(self, linear: Linear) -> None:
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def __call__(self, x: Tensor) -> Tensor:
        self.input, self.output = x.detach(), self.linear(x)
        return self.output


def _start_backwards(source: ModelSource, hidden: Tensor, backend: ReferenceBackend, seed: int) -> Tensor:
    """The gradient at the last layer's output, of its shape [samples, length, hidden], of v · logits for a random v.

    v = √p ξ − p (√p · ξ) has the covariance diag(p) − p pᵀ where the entries of ξ are ±1 by chance. The vocabulary is
    gone through twice in pieces, so that neither the head nor the logits are ever whole in floating point.
    """
    hidden = hidden.detach().requires_grad_()
    norm = place_norm(source.final_norm, source.config, backend)
    normed = backend.rms_norm(hidden, norm, source.config.rms_norm_eps)
    last = normed.detach().flatten(0, 1)
    head, cap = source.head, source.config.logit_soft_cap
    total = torch.full((len(last), 1), -torch.inf, device=last.device)
    for rows in _pieces(head, backend):
        total = torch.logaddexp(total, _capped(_product(last, rows), cap)[0].logsumexp(1, keepdim=True))
    random = torch.Generator(backend.device).manual_seed(seed)
    signed, mean, sum_signed = torch.zeros_like(last), torch.zeros_like(last), torch.zeros_like(total)
    for rows in _pieces(head, backend):
        logits, slope = _capped(_product(last, rows), cap)
        p = (logits - total).exp_()
        root = p.sqrt() * (torch.randint(0, 2, p.shape, generator=random, device=p.device) * 2 - 1)
        signed += _product(root * slope, rows.T)
        mean += _product(p * slope, rows.T)
        sum_signed += root.sum(1, keepdim=True)
    at_normed = (signed - sum_signed * mean).view_as(normed)
    return torch.autograd.grad(normed, hidden, at_normed)[0]


def _capped(logits: Tensor, cap: float | None) -> tuple[Tensor, Tensor | float]:
    """Logits as the model gives them out, and their derivative with respect to what the head gave."""
    if cap is None:
        return logits, 1.0
    share = (logits / cap).tanh()
    return share * cap, 1 - share.square()


def _pieces(head: Weight, backend: ReferenceBackend) -> Iterator[Tensor]:
    for rows in torch.arange(head.shape[0]).split(VOCABULARY_AT_ONCE):
        piece = head.select_rows(rows).dequantize() if isinstance(head, QuantizedTensor) else head[rows]
        yield piece.to(backend.device, backend.products)


def _product(x: Tensor, rows: Tensor) -> Tensor:
    """float32 [T, rows] of x [T, in] and rows [rows, in]."""
    return F.linear(x.to(rows.dtype), rows).float()
