"""Drafts from a smaller model with the same vocabulary."""

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from llmopt.engine.batch import build_batch
from llmopt.engine.request import Request
from llmopt.engine.row import Row
from llmopt.engine.runner import Runner
from llmopt.engine.sampler import Sampler
from llmopt.engine.scheduler import Chunk
from llmopt.engine.speculation.drafter import GoesOn
from llmopt.engine.speculation.linear_cost import LinearCost
from llmopt.errors import InputError
from llmopt.model.source import ModelSource, open_source

_MOST_ROWS = 4
"""Rows for each request up to which a pass tells what passes cost; with more it is catching up."""


@dataclass
class _Progress:
    """How far the draft has come with a request.

    Attributes:
        computed: how many of its tokens have their keys and values in the draft's cache.
        named: how many of its blocks are noted as full.
        preemptions: of the request, when this was so; a later one has taken its blocks.
        likelihoods: of the tokens that were drafted last, those that the draft found likeliest, at each place.
    """

    computed: int
    named: int
    preemptions: int
    likelihoods: list[float] = field(default_factory=list)


class DraftModel:
    """A model that goes ahead of the target, choosing tokens as the request wants its own to be chosen.

    Its cache has as many blocks as the target's, and a request's table is good for both: what the scheduler shares,
    keeps and takes away is so for the two of them. Only what is computed differs, because nothing is drafted for a
    prompt, nor where it does not pay. So this counts by itself what it has computed, and closes the gap, by the
    scheduler's rule, when it is asked.
    """

    by_confidence = True

    def __init__(self, runner: Runner, block_size: int, budget: int) -> None:
        """`runner` has a cache of the target's blocks; `budget` tokens at most are computed in a pass."""
        self.runner = runner
        self.block_size = block_size
        self.budget = budget
        self.cost = LinearCost()
        self._sampler = Sampler(runner.backend)
        self._progress: WeakKeyDictionary[Request, _Progress] = WeakKeyDictionary()
        self._keys: list[bytes | None] = [None] * runner.plan.blocks  # of what the draft's cache has in a block

    def lag(self, request: Request) -> int | None:
        longest = self.runner.plan.max_model_len
        return request.known - 1 - self._look_at(request).computed if request.known < longest else None

    def draft(self, chunks: Sequence[Chunk], goes_on: GoesOn) -> None:
        for chunk in chunks:
            chunk.request.drafts = []
            self._progress[chunk.request].likelihoods = []
        while chunks:
            self._draft_next([chunk.request for chunk in chunks])
            together = len(chunks)
            chunks = [
                chunk
                for chunk in chunks
                if len(chunk.request.drafts) < chunk.drafted
                and goes_on(chunk.request, self.likelihoods(chunk.request), together)
            ]

    def likelihoods(self, request: Request) -> Sequence[float]:
        return self._progress[request].likelihoods

    def seconds(self, rows: int) -> float:
        return self.cost(rows)

    def _draft_next(self, requests: list[Request]) -> None:
        """Draft one more token for each request, in one pass, or several where there is much to catch up with."""
        while requests:
            begun = time.perf_counter()
            chunks = self._chunks(requests)
            batch = build_batch(chunks, self.block_size)
            closed = [chunk for chunk in chunks if self._gap(chunk.request) == chunk.count]  # all but perhaps the last
            if closed:
                last_rows = array("q", [end - 1 for end in batch.host.query_starts[1 : len(closed) + 1]])
                rows = [Row(chunk.request, tuple(chunk.request.drafts)) for chunk in closed]
                batch = replace(batch, rows=rows, last_rows=last_rows)
                logits = self.runner.run(batch)
                likelihoods = _largest_probabilities(logits)
                tokens = self._sampler(logits, rows).token_ids
            else:
                self.runner.hidden(batch)
                tokens, likelihoods = [], []
            self._retire(chunks)
            for chunk, token, likelihood in zip(closed, tokens, likelihoods, strict=True):
                chunk.request.drafts.append(token)
                self._progress[chunk.request].likelihoods.append(likelihood)
            rows_in_all = sum(chunk.count for chunk in chunks)
            if rows_in_all <= _MOST_ROWS * len(requests):
                self.cost.observe(rows_in_all, time.perf_counter() - begun)
            requests = requests[len(closed) :]

    def _chunks(self, requests: Sequence[Request]) -> list[Chunk]:
        """What a pass computes: the gaps of requests, one after the other, as far as the budget goes."""
        budget = self.budget
        chunks: list[Chunk] = []
        for request in requests:
            count = min(self._gap(request), budget)
            if count == 0:
                break
            chunks.append(Chunk(request, self._progress[request].computed, count))
            budget -= count
        return chunks

    def _gap(self, request: Request) -> int:
        return request.known + len(request.drafts) - self._progress[request].computed

    def _retire(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            progress = self._progress[chunk.request]
            progress.computed = chunk.start + chunk.count
            for place in range(chunk.start // self.block_size, -(-progress.computed // self.block_size)):
                self._keys[chunk.request.blocks[place]] = None  # until it is known to be full

    def _look_at(self, request: Request) -> _Progress:
        """How far the draft has come with a request, now that the target has gone on."""
        progress = self._progress.get(request)
        if progress is None or progress.preemptions != request.preemptions:
            progress = self._progress[request] = _Progress(0, 0, request.preemptions)
        progress.computed = min(progress.computed, request.known - 1)  # what was drafted beyond turned out wrong
        for place in range(progress.named, min(len(request.keys), (request.known - 1) // self.block_size)):
            block, key, end = request.blocks[place], request.keys[place], (place + 1) * self.block_size
            if progress.computed < end and self._keys[block] != key:
                break
            self._keys[block] = key
            progress.computed = max(progress.computed, end)
            progress.named = place + 1
        return progress


def _largest_probabilities(logits: Tensor) -> list[float]:
    """In each row of logits [rows, vocabulary], before temperature and penalties.

    Without torch, whose threads would have to be woken for it: where another process takes a core they wait for each
    other longer than the draft's pass takes.
    """
    return [float(1 / np.exp(row - row.max()).sum()) for row in logits.cpu().numpy()]


def open_draft(model: str, target: ModelSource) -> ModelSource:
    """The draft for a target. Raises InputError where their vocabularies are not the same."""
    source = open_source(model)
    ours, theirs = source.config.vocab_size, target.config.vocab_size
    if ours != theirs:
        raise InputError(f"the draft {model} has a vocabulary of {ours} tokens and the target one of {theirs}")
    if source.tokenizer.encoder.get_vocab() != target.tokenizer.encoder.get_vocab():
        raise InputError(f"the draft {model} has other tokens in its vocabulary than the target")
    return source
