"""Chooses the next tokens of every request of a step at once."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmopt.backend.base import Backend
from llmopt.backend.sampling import Bias, Draws, Penalties, SamplingBatch, TokenLists
from llmopt.engine.logprobs import report
from llmopt.engine.outputs import TokenLogprobs
from llmopt.engine.row import Row
from llmopt.engine.token_rules import NO_RULES

NO_WISHES = SamplingBatch()


@dataclass(frozen=True)
class Sampled:
    """One token for each row, and what was asked to be known about it."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class Sampler:
    """Gathers what requests want into arrays, for the backend to sample by, and reports log-probabilities.

    A request's choice depends on its own logits, its seed and its position alone, never on its neighbours in the
    batch: the only random number it takes is a hash of its seed and of how many tokens come before. Where tokens are
    drafted, it is what would be chosen if they had been chosen one by one.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __call__(self, logits: Tensor, rows: list[Row]) -> Sampled:
        """Sample from float32 logits [len(rows), vocabulary], which are overwritten."""
        if all(row.request.takes_likeliest for row in rows):
            return Sampled(self.backend.sample(logits, NO_WISHES).tolist(), [None] * len(rows))
        return self._sample(logits, rows)

    @torch.inference_mode()
    def _sample(self, logits: Tensor, rows: list[Row]) -> Sampled:
        counts = ((place, row.request.params.logprobs) for place, row in enumerate(rows))
        wanted = {place: count for place, count in counts if count is not None}
        places = list(wanted)
        # As the model gave them, so before anything changes the logits.
        logprobs = logits[places].log_softmax(-1) if places else None
        batch = SamplingBatch(_draws(rows), _bias(rows), _penalties(rows), *_limits(rows))
        tokens = self.backend.sample(logits, batch)
        reports: list[TokenLogprobs | None] = [None] * len(rows)
        if logprobs is not None:
            for place, found in zip(places, report(logprobs, tokens[places], list(wanted.values())), strict=True):
                reports[place] = found
        return Sampled(tokens.tolist(), reports)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is the same for the same seed and position everywhere."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _draws(rows: list[Row]) -> Draws | None:
    params = [row.request.params for row in rows]
    if all(one.greedy for one in params):
        return None
    return Draws(
        temperature=np.array([0 if one.greedy else one.temperature for one in params], np.float32),
        top_k=np.array([one.top_k for one in params], np.int64),
        top_p=np.array([one.top_p for one in params], np.float32),
        min_p=np.array([one.min_p for one in params], np.float32),
        uniform=np.array([uniform(row.request.seed, row.position) for row in rows]),
    )


def _bias(rows: list[Row]) -> Bias | None:
    rules = [row.request.rules for row in rows]
    if not any(len(one.bias_tokens) for one in rules):
        return None
    return Bias(*_joined([one.bias_tokens for one in rules]), np.concatenate([one.bias_values for one in rules]))


def _limits(rows: list[Row]) -> tuple[TokenLists | None, TokenLists | None]:
    """The tokens that are forbidden, and those that alone are allowed."""
    if all(row.request.rules is NO_RULES for row in rows):
        return None, None
    forbidden = [row.request.rules.forbidden(row.before, row.request.prompt_length) for row in rows]
    allowed = [row.request.rules.allowed for row in rows]
    return (
        _joined([np.fromiter(tokens, np.int32, len(tokens)) for tokens in forbidden]) if any(forbidden) else None,
        _joined(allowed) if any(map(len, allowed)) else None,
    )


def _penalties(rows: list[Row]) -> Penalties | None:
    params = [row.request.params for row in rows]
    if not any(one.has_penalties for one in params):
        return None
    counted = [_counted(row) for row in rows]
    return Penalties(
        np.array([one.repetition_penalty for one in params], np.float32),
        np.array([one.frequency_penalty for one in params], np.float32),
        np.array([one.presence_penalty for one in params], np.float32),
        *_joined([np.asarray(tokens, np.int32) for tokens, _ in counted]),
        counts=np.concatenate([np.asarray(counts, np.int32) for _, counts in counted]),
    )


def _counted(row: Row) -> tuple[Sequence[int], Sequence[int]]:
    """The distinct tokens before a row, and how often the output has each; none where nothing is penalised."""
    request = row.request
    if not request.params.has_penalties:
        return (), ()
    request.counts.catch_up(request.tokens, request.prompt_length)
    return request.counts.followed_by(row.drafts)


def _joined(lists: list[np.ndarray]) -> TokenLists:
    """Lists of tokens, one a row, end to end."""
    return TokenLists(np.cumsum([0, *map(len, lists)], dtype=np.int64), np.concatenate(lists))
