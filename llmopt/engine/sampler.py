"""Chooses the next token of every request of a step at once."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmopt.backend.base import Backend
from llmopt.backend.sampling import Bias, Draws, Penalties, SamplingBatch, TokenLists
from llmopt.engine.logprobs import report
from llmopt.engine.outputs import TokenLogprobs
from llmopt.engine.request import Request
from llmopt.engine.token_rules import NO_RULES

NO_WISHES = SamplingBatch()


@dataclass(frozen=True)
class Sampled:
    """One token for each request, and what was asked to be known about it."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class Sampler:
    """Gathers what requests want into arrays, for the backend to sample by, and reports log-probabilities.

    A request's choice depends on its own logits, its seed and its position alone, never on its neighbours in the
    batch: the only random number it takes is a hash of its seed and of how many tokens it has.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __call__(self, logits: Tensor, requests: list[Request]) -> Sampled:
        """Sample from float32 logits [len(requests), vocabulary], which are overwritten."""
        if all(request.takes_likeliest for request in requests):
            return Sampled(self.backend.sample(logits, NO_WISHES).tolist(), [None] * len(requests))
        return self._sample(logits, requests)

    @torch.inference_mode()
    def _sample(self, logits: Tensor, requests: list[Request]) -> Sampled:
        wanted = {row: one.params.logprobs for row, one in enumerate(requests) if one.params.logprobs is not None}
        rows = list(wanted)
        # As the model gave them, so before anything changes the logits.
        logprobs = logits[rows].log_softmax(-1) if rows else None
        batch = SamplingBatch(_draws(requests), _bias(requests), _penalties(requests), *_limits(requests))
        tokens = self.backend.sample(logits, batch)
        reports: list[TokenLogprobs | None] = [None] * len(requests)
        if logprobs is not None:
            for row, found in zip(rows, report(logprobs, tokens[rows], list(wanted.values())), strict=True):
                reports[row] = found
        return Sampled(tokens.tolist(), reports)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is the same for the same seed and position everywhere."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _draws(requests: list[Request]) -> Draws | None:
    if all(request.params.greedy for request in requests):
        return None
    params = [request.params for request in requests]
    return Draws(
        temperature=np.array([0 if one.greedy else one.temperature for one in params], np.float32),
        top_k=np.array([one.top_k for one in params], np.int64),
        top_p=np.array([one.top_p for one in params], np.float32),
        min_p=np.array([one.min_p for one in params], np.float32),
        uniform=np.array([uniform(request.seed, request.known) for request in requests]),
    )


def _bias(requests: list[Request]) -> Bias | None:
    rules = [request.rules for request in requests]
    if not any(len(one.bias_tokens) for one in rules):
        return None
    return Bias(*_joined([one.bias_tokens for one in rules]), np.concatenate([one.bias_values for one in rules]))


def _limits(requests: list[Request]) -> tuple[TokenLists | None, TokenLists | None]:
    """The tokens that are forbidden, and those that alone are allowed."""
    if all(request.rules is NO_RULES for request in requests):
        return None, None
    forbidden = [request.rules.forbidden(request.tokens, request.prompt_length) for request in requests]
    allowed = [request.rules.allowed for request in requests]
    return (
        _joined([np.fromiter(tokens, np.int32, len(tokens)) for tokens in forbidden]) if any(forbidden) else None,
        _joined(allowed) if any(map(len, allowed)) else None,
    )


def _penalties(requests: list[Request]) -> Penalties | None:
    if not any(request.params.has_penalties for request in requests):
        return None
    for request in requests:
        if request.params.has_penalties:
            request.counts.catch_up(request.tokens, request.prompt_length)
    params = [request.params for request in requests]
    return Penalties(
        np.array([one.repetition_penalty for one in params], np.float32),
        np.array([one.frequency_penalty for one in params], np.float32),
        np.array([one.presence_penalty for one in params], np.float32),
        *_joined([np.asarray(request.counts.tokens, np.int32) for request in requests]),
        counts=np.concatenate([np.asarray(request.counts.counts, np.int32) for request in requests]),
    )


def _joined(lists: list[np.ndarray]) -> TokenLists:
    """Lists of tokens, one a row, end to end."""
    return TokenLists(np.cumsum([0, *map(len, lists)], dtype=np.int64), np.concatenate(lists))
