"""Sampling in plain torch, on any device: the definition that compiled sampling is tested against.

Of equally likely tokens the one with the smaller id counts as the likelier. A row whose largest logit (over the
temperature) is infinite, or that holds a NaN, takes the first token with that value, as `argmax` does.
"""

import numpy as np
import torch
from torch import Tensor

from llmopt.backend.sampling import Bias, Draws, Penalties, SamplingBatch, TokenLists


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """One token for each row of float32 logits [R, vocabulary], which are overwritten: int64 [R]."""
    adjust(logits, batch)
    tokens = logits.argmax(-1)
    if batch.draws is None:
        return tokens
    draws = batch.draws
    drawn = draws.temperature > 0
    for rows, choose in ((drawn & ~draws.filtered(), _draw), (drawn & draws.filtered(), _draw_filtered)):
        if rows.any():
            index = torch.from_numpy(np.flatnonzero(rows)).to(logits.device)
            own = draws.of_rows(rows)
            scaled = logits[index] / _column(own.temperature, logits.device)
            top = scaled.amax(-1, keepdim=True)
            tokens[index] = torch.where(top[:, 0].isfinite(), choose(scaled, top, own), tokens[index])
    return tokens


def adjust(logits: Tensor, batch: SamplingBatch) -> None:
    """All that changes float32 logits [R, vocabulary] before a token is chosen, in place."""
    if batch.bias is not None:
        logits[_places(batch.bias, logits.device)] += torch.from_numpy(batch.bias.values).to(logits.device)
    if batch.penalties is not None:
        _penalise(logits, batch.penalties)
    if batch.forbidden is not None:
        logits[_places(batch.forbidden, logits.device)] = -torch.inf
    if batch.allowed is not None:
        _keep_only(logits, batch.allowed)


def _keep_only(logits: Tensor, allowed: TokenLists) -> None:
    places = _places(allowed, logits.device)
    kept = logits[places]
    logits[places[0].unique()] = -torch.inf
    logits[places] = kept


def _penalise(logits: Tensor, penalties: Penalties) -> None:
    """Keskar et al. 2019 (arXiv:1909.05858) for repetition; presence and frequency as in OpenAI's API."""
    places = _places(penalties, logits.device)

    def each(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(logits.device)[places[0]]

    counts = torch.from_numpy(penalties.counts).to(logits.device)
    repetition, frequency, presence = each(penalties.repetition), each(penalties.frequency), each(penalties.presence)
    values = logits[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[places] = torch.where(counts > 0, values - (frequency * counts + presence), values)


def _draw(scaled: Tensor, top: Tensor, draws: Draws) -> Tensor:
    """A token for each row [R, vocabulary], by the running sum in the order of ids; `top` [R, 1] is its largest."""
    return _inverse((scaled - top).double().exp(), draws)


def _draw_filtered(scaled: Tensor, top: Tensor, draws: Draws) -> Tensor:
    """As `_draw`, with the unlikely tokens cut off, by the running sum in the order of likelihood."""
    ordered, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    weights = (ordered - top).double().exp()  # 1 for the likeliest
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    top_k = _column(draws.top_k, scaled.device)
    weights.masked_fill_((top_k > 0) & (rank >= top_k), 0)
    weights.masked_fill_(weights < _column(draws.min_p, scaled.device), 0)
    sums = weights.cumsum(-1)
    unlikely = sums - weights >= _column(draws.top_p, scaled.device) * sums[:, -1:]
    return tokens.gather(1, _inverse(weights.masked_fill_(unlikely, 0), draws)[:, None])[:, 0]


def _inverse(weights: Tensor, draws: Draws) -> Tensor:
    """The place at which the running sum of weights passes each row's random number, in units of their sum."""
    sums = weights.cumsum(-1)
    target = _column(draws.uniform, weights.device) * sums[:, -1:]
    return torch.searchsorted(sums, target, right=True)[:, 0].clamp(max=weights.shape[1] - 1)


def _column(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)[:, None]


def _places(lists: TokenLists | Bias | Penalties, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows and the tokens of lists, as an index into logits."""
    rows = np.repeat(np.arange(len(lists.starts) - 1), np.diff(lists.starts))
    return torch.from_numpy(rows).to(device), torch.from_numpy(lists.tokens).long().to(device)
