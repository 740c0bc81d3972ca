"""Chooses the next token of every request of a step at once."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.engine.outputs import TokenLogprobs
from llmopt.engine.params import SamplingParams
from llmopt.engine.request import Request


@dataclass(frozen=True)
class Sampled:
    """One token for each request, and what was asked to be known about it."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class Sampler:
    """Penalties, then temperature, then top-k, top-p and min-p, then a draw; greedy rows take the largest logit.

    A request's choice depends on its own logits, its seed and its position alone, never on its neighbours in the
    batch: the only random number it takes is a hash of its seed and of how many tokens it has.
    """

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self.eos_ids = eos_ids

    @torch.inference_mode()
    def __call__(self, logits: Tensor, requests: list[Request]) -> Sampled:
        """Sample from float32 logits [len(requests), vocabulary], which are overwritten."""
        reports = _LogprobReport.prepare(logits, requests)
        _penalise(logits, requests)
        self._forbid_early_ends(logits, requests)
        tokens = logits.argmax(-1)
        drawn = [i for i, request in enumerate(requests) if not request.params.greedy]
        filtered = [i for i in drawn if _has_filter(requests[i].params)]
        plain = [i for i in drawn if not _has_filter(requests[i].params)]
        if plain:
            tokens[plain] = _draw(logits[plain], [requests[i] for i in plain])
        if filtered:
            tokens[filtered] = _draw_filtered(logits[filtered], [requests[i] for i in filtered])
        return Sampled(tokens.tolist(), reports.of(tokens) if reports else [None] * len(requests))

    def _forbid_early_ends(self, logits: Tensor, requests: list[Request]) -> None:
        for row, request in enumerate(requests):
            if request.output_length < request.params.min_tokens:
                logits[row, [*self.eos_ids, *request.params.stop_token_ids]] = -torch.inf


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is the same for the same seed and position everywhere."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _has_filter(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _penalise(logits: Tensor, requests: list[Request]) -> None:
    for row, request in enumerate(requests):
        params = request.params
        if not params.has_penalties:
            continue
        if params.repetition_penalty != 1:
            seen = torch.tensor(request.tokens, device=logits.device).unique()
            values = logits[row, seen]
            harder = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
            logits[row, seen] = harder
        if request.output_length:
            output = torch.tensor(request.output, device=logits.device)
            tokens, counts = output.unique(return_counts=True)
            logits[row, tokens] -= params.frequency_penalty * counts + params.presence_penalty


def _column(requests: list[Request], name: str, device: torch.device) -> Tensor:
    """One parameter of all requests, [rows, 1]."""
    return torch.tensor([[getattr(request.params, name)] for request in requests], device=device)


def _uniforms(requests: list[Request], device: torch.device) -> Tensor:
    draws = [[uniform(request.seed, request.known)] for request in requests]
    return torch.tensor(draws, dtype=torch.float64, device=device)


def _draw(logits: Tensor, requests: list[Request]) -> Tensor:
    probabilities = (logits / _column(requests, "temperature", logits.device)).softmax(-1)
    return _inverse(probabilities, requests)


def _draw_filtered(logits: Tensor, requests: list[Request]) -> Tensor:
    """As `_draw`, with the unlikely tokens cut off; works on the tokens sorted by likelihood."""
    scaled, order = (logits / _column(requests, "temperature", logits.device)).sort(
        dim=-1, descending=True, stable=True
    )
    top_k = _column(requests, "top_k", logits.device)
    rank = torch.arange(logits.shape[1], device=logits.device)
    scaled.masked_fill_((top_k > 0) & (rank >= top_k), -torch.inf)
    probabilities = scaled.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # the mass of the likelier tokens; 0 for the first, so it stays
    unlikely = (before >= _column(requests, "top_p", logits.device)) & (rank > 0)
    unlikely |= probabilities < _column(requests, "min_p", logits.device) * probabilities[:, :1]
    probabilities.masked_fill_(unlikely, 0)
    return order.gather(1, _inverse(probabilities, requests)[:, None])[:, 0]


def _inverse(probabilities: Tensor, requests: list[Request]) -> Tensor:
    """The token at which the running sum of probabilities passes each request's random number."""
    sums = probabilities.double().cumsum(-1)
    target = _uniforms(requests, probabilities.device) * sums[:, -1:]
    return torch.searchsorted(sums, target, right=True)[:, 0].clamp(max=probabilities.shape[1] - 1)


@dataclass(frozen=True)
class _LogprobReport:
    """Log-probabilities as the model gave them, kept before penalties change the logits."""

    logprobs: Tensor
    wanted: list[int | None]

    @classmethod
    def prepare(cls, logits: Tensor, requests: list[Request]) -> "_LogprobReport | None":
        wanted = [request.params.logprobs for request in requests]
        if all(count is None for count in wanted):
            return None
        return cls(logits.log_softmax(-1), wanted)

    def of(self, tokens: Tensor) -> list[TokenLogprobs | None]:
        chosen = self.logprobs.gather(1, tokens[:, None])
        ranks = (self.logprobs >= chosen).sum(-1).tolist()
        most = max(count or 0 for count in self.wanted)
        values, ids = self.logprobs.topk(most, dim=-1)
        rows = zip(
            self.wanted, tokens.tolist(), chosen[:, 0].tolist(), ranks, ids.tolist(), values.tolist(), strict=True
        )
        return [
            None if count is None else TokenLogprobs(token, logprob, rank, list(zip(ids, values, strict=True))[:count])
            for count, token, logprob, rank, ids, values in rows
        ]
