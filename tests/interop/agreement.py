"""How far a peer's predictions may be from ours on the same artifact, and why.

Ours are always those of the backend `reference` in float32. The measure is mean KL(ours ‖ peer) in nats over a few
hundred tokens: unlike the largest difference of a logit it weighs what matters to the text, and unlike a comparison of
generated tokens it does not depend on ties. A wrong byte order, zero point or scale costs
several tenths of a nat at least.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmopt.engine.config import EngineConfig
from llmopt.engine.scoring import Scorer


@dataclass(frozen=True)
class Tolerance:
    """The largest mean KL, and what the peer computes otherwise."""

    mean_kl: float
    reason: str


TOLERANCES = {
    "auto-gptq": Tolerance(1e-6, "it multiplies in float32 as we do; only the order of sums differs"),
    "autoawq": Tolerance(2e-4, "it multiplies in float16, whose rounding is 2^-11 of each value"),
    "transformers": Tolerance(1e-6, "it multiplies in float32 as we do; only the order of sums differs"),
    "vllm": Tolerance(5e-3, "it computes in bfloat16, whose rounding is 2^-9 of each activation"),
    "llama.cpp": Tolerance(
        1e-2,
        "it rounds activations to 8 bits in blocks (in groups of 64 that costs 3.4e-3 here) "
        "and stores logits in 16 bits (5.5e-4)",
    ),
    "llama.cpp float": Tolerance(2e-3, "it rounds activations to 16 bits and stores logits in 16 bits (5.5e-4)"),
}
ROUNDING = (
    "where a value lies next to a boundary of the 8-bit grid, the smallest difference in the order of sums moves it to "
    "another code, and after a few layers two roundings of activations are independent (our own logits move by as much "
    "when inputs are changed by one millionth); so what is compared is how far each is from unrounded activations"
)
ROUNDING_FACTOR = 1.5


def our_logits(model: str, sequences: list[list[int]]) -> Tensor:
    """Float32 [sequences, length, vocabulary], by the reference."""
    config = EngineConfig(model=model, backend="reference", dtype="float32", max_model_len=len(sequences[0]))
    scorer = Scorer(config)
    return torch.stack([torch.cat([block.clone() for block in scorer.logits(tokens)]) for tokens in sequences])


def mean_kl(ours: Tensor, theirs: Tensor) -> float:
    """Mean KL(ours ‖ theirs) of logits, or of logarithms of probabilities, [..., vocabulary]; in float64."""
    total, rows = 0.0, 0
    for our_rows, their_rows in zip(ours.flatten(0, -2).split(64), theirs.flatten(0, -2).split(64), strict=True):
        p, q = torch.log_softmax(our_rows.double(), 1), torch.log_softmax(their_rows.double(), 1)
        total += float((p.exp() * (p - q)).sum())
        rows += len(our_rows)
    return total / rows


def mean_kl_of_top(ours: Tensor, ids: np.ndarray, logprobs: np.ndarray) -> float:
    """Mean KL where only the likeliest tokens of the peer are known: all others count as one event.

    That is never more than the whole KL, and nearly all of it where these tokens hold nearly all the probability.

    Args:
        ours: logits [sequences, length, vocabulary].
        ids, logprobs: [sequences, length, tokens known], of the same positions.
    """
    known = torch.from_numpy(ids.astype(np.int64))
    p = torch.log_softmax(ours.double(), -1).gather(-1, known)
    q = torch.from_numpy(logprobs).double()
    p_rest = (1 - p.exp().sum(-1)).clamp_min(1e-12)
    q_rest = (1 - q.exp().sum(-1)).clamp_min(1e-12)
    return float(((p.exp() * (p - q)).sum(-1) + p_rest * (p_rest / q_rest).log()).mean())
