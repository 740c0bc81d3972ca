"""How well logits predict a text, and how far they are from a reference's."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmopt.errors import InputError, LlmoptError

_ROWS = 64  # rows in float64 at a time: a vocabulary of 150,000 takes 80 MB a copy


def log_likelihoods(logits: Tensor, targets: Tensor) -> np.ndarray:
    """Negative log-likelihood in nats, float64 [n], of targets int64 [n] under logits float [n, vocabulary].

    Perplexity is exp of its mean over every predicted token: in a window of ctx tokens these are the tokens 1 to
    ctx - 1, each given all those before it. (llama-perplexity scores only the second half of a window, and so shows
    lower numbers.) Raises LlmoptError for logits that are not finite.
    """
    parts = [_log_softmax(rows) for rows in logits.split(_ROWS)]
    nll = [-part.gather(1, rows[:, None])[:, 0] for part, rows in zip(parts, targets.split(_ROWS), strict=True)]
    return torch.cat(nll).cpu().numpy()


@dataclass(frozen=True)
class Comparison:
    """A model against its reference, for each of n positions.

    Attributes:
        kl: float64 [n], KL(reference ‖ model) = Σ p_ref (log p_ref - log p_model) over the whole vocabulary, in nats.
        same_top: bool [n], whether both hold the same token likeliest.
        nll, reference_nll: float64 [n], as `log_likelihoods` has them.
    """

    kl: np.ndarray
    same_top: np.ndarray
    nll: np.ndarray
    reference_nll: np.ndarray


def compare(reference: Tensor, model: Tensor, targets: Tensor) -> Comparison:
    """Compare logits, both float [n, vocabulary], at positions whose next tokens are targets, int64 [n].

    Everything is computed in float64, a few rows at a time: in float32 the rounding of KL's many small terms is as
    large as the divergence of an 8-bit model. Raises InputError for vocabularies of different sizes, LlmoptError for
    logits that are not finite.
    """
    if reference.shape != model.shape:
        raise InputError(
            f"the model has a vocabulary of {model.shape[-1]} and the reference one of {reference.shape[-1]}; "
            "divergence needs the same"
        )
    reference, targets = reference.to(model.device), targets.to(model.device)
    columns: list[list[Tensor]] = [[], [], [], []]
    for truth_rows, rows, next_tokens in zip(
        reference.split(_ROWS), model.split(_ROWS), targets.split(_ROWS), strict=True
    ):
        truth, guess = _log_softmax(truth_rows), _log_softmax(rows)
        values = (
            (truth.exp() * (truth - guess)).sum(dim=1).clamp_min(0.0),  # rounding alone can make it negative
            truth_rows.argmax(dim=1) == rows.argmax(dim=1),
            -guess.gather(1, next_tokens[:, None])[:, 0],
            -truth.gather(1, next_tokens[:, None])[:, 0],
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return Comparison(*(torch.cat(column).cpu().numpy() for column in columns))


def _log_softmax(logits: Tensor) -> Tensor:
    if not torch.isfinite(logits).all():
        raise LlmoptError("the model's logits are not finite; its weights or its dtype are broken")
    return torch.log_softmax(logits.double(), dim=1)
