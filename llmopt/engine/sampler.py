"""Chooses the next token of every request of a step at once."""

import hashlib
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from llmopt.backend.base import Backend
from llmopt.backend.sampling import Draws, Penalties, SamplingBatch, TokenLists
from llmopt.engine.outputs import TokenLogprobs
from llmopt.engine.request import Request


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

    def __init__(self, backend: Backend, eos_ids: frozenset[int]) -> None:
        self.backend = backend
        self.eos_ids = eos_ids

    @torch.inference_mode()
    def __call__(self, logits: Tensor, requests: list[Request]) -> Sampled:
        """Sample from float32 logits [len(requests), vocabulary], which are overwritten."""
        report = _LogprobReport.prepare(logits, requests)
        batch = SamplingBatch(
            draws=_draws(requests), penalties=_penalties(requests), forbidden=self._early_ends(requests)
        )
        tokens = self.backend.sample(logits, batch)
        return Sampled(tokens.tolist(), report.of(tokens) if report else [None] * len(requests))

    def _early_ends(self, requests: list[Request]) -> TokenLists | None:
        """The end tokens of requests that must not end yet."""
        ends = [
            [*self.eos_ids, *request.params.stop_token_ids] if request.output_length < request.params.min_tokens else []
            for request in requests
        ]
        if not any(ends):
            return None
        return TokenLists(_starts([len(tokens) for tokens in ends]), np.array(list(chain(*ends)), np.int32))


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


def _penalties(requests: list[Request]) -> Penalties | None:
    if not any(request.params.has_penalties for request in requests):
        return None
    for request in requests:
        if request.params.has_penalties:
            request.counts.catch_up(request.tokens, request.prompt_length)
    params = [request.params for request in requests]
    return Penalties(
        repetition=np.array([one.repetition_penalty for one in params], np.float32),
        frequency=np.array([one.frequency_penalty for one in params], np.float32),
        presence=np.array([one.presence_penalty for one in params], np.float32),
        starts=_starts([len(request.counts.tokens) for request in requests]),
        tokens=np.concatenate([np.asarray(request.counts.tokens, np.int32) for request in requests]),
        counts=np.concatenate([np.asarray(request.counts.counts, np.int32) for request in requests]),
    )


def _starts(lengths: list[int]) -> np.ndarray:
    """Where each of several lists begins when they lie end to end, and where the last ends."""
    return np.cumsum([0, *lengths], dtype=np.int64)


@dataclass(frozen=True)
class _LogprobReport:
    """Log-probabilities as the model gave them, of the rows that want some, before penalties change the logits."""

    rows: list[int]
    wanted: list[int | None]
    logprobs: Tensor

    @classmethod
    def prepare(cls, logits: Tensor, requests: list[Request]) -> "_LogprobReport | None":
        wanted = [request.params.logprobs for request in requests]
        rows = [row for row, count in enumerate(wanted) if count is not None]
        if not rows:
            return None
        own = logits if len(rows) == len(requests) else logits[rows]
        return cls(rows, wanted, own.log_softmax(-1))

    def of(self, tokens: Tensor) -> list[TokenLogprobs | None]:
        """One report for each request, None where it wants none, for the tokens [requests] that were chosen."""
        chosen = tokens[self.rows]
        own = self.logprobs.gather(1, chosen[:, None])
        ranks = (self.logprobs >= own).sum(-1).tolist()
        values, ids = self.logprobs.topk(max(count or 0 for count in self.wanted), dim=-1)
        reports: list[TokenLogprobs | None] = [None] * len(self.wanted)
        each = zip(self.rows, chosen.tolist(), own[:, 0].tolist(), ranks, ids.tolist(), values.tolist(), strict=True)
        for row, token, logprob, rank, top_ids, top_values in each:
            top = list(zip(top_ids, top_values, strict=True))[: self.wanted[row]]
            reports[row] = TokenLogprobs(token, logprob, rank, top)
        return reports
