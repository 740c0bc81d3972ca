"""A mixture of experts: a router sends each token to a few of many small MLPs.

Shazeer et al. 2017, "Outrageously Large Neural Networks", arXiv:1701.06538.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.model.config import ExpertsConfig


def route(x: Tensor, router: Tensor, config: ExpertsConfig) -> tuple[Tensor, Tensor]:
    """The experts of each token: their weights and numbers, [T, chosen] each, in x's dtype and int64.

    Every expert has a probability, the softmax of the router's products; the likeliest are chosen (Mixtral,
    arXiv:2401.04088). `router` is [experts, hidden].
    """
    probabilities = F.linear(x, router).float().softmax(-1)
    weights, chosen = probabilities.topk(config.chosen, dim=-1)
    if config.normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(x.dtype), chosen


def mix(x: Tensor, router: Tensor, config: ExpertsConfig, run: Callable[[int, Tensor], Tensor]) -> Tensor:
    """What the experts make of tokens x [T, hidden], each weighted as the router says; the same shape.

    `run(expert, tokens)` is one expert on some tokens [n, hidden]; it is called once for each that any token goes to.
    """
    weights, chosen = route(x, router, config)
    result = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        made = run(expert, x[tokens]) * weights[tokens, places, None]
        result = result.index_add_(0, tokens, made.to(x.dtype))
    return result
