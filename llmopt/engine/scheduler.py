"""Decides what each step computes.

There is one rule. A request has a number of tokens *known* and a number *computed*; each step spends a budget of tokens
on closing these gaps, running requests first, oldest first. A new prompt, a chunk of a long one, one decoded token and
the recomputation after a preemption are all the same thing under that rule (Agrawal et al. 2023, arXiv:2308.16369).
"""

from collections import deque
from dataclasses import dataclass

from llmopt.engine.block_pool import BlockPool
from llmopt.engine.request import Request


@dataclass(frozen=True)
class Chunk:
    """The tokens of one request that a step computes: `count` of them from position `start`."""

    request: Request
    start: int
    count: int

    @property
    def tokens(self) -> list[int]:
        return self.request.tokens[self.start : self.start + self.count]

    @property
    def closes_gap(self) -> bool:
        """Whether the request's last known token is among them, so that the next one can be sampled."""
        return self.start + self.count == self.request.known


class Scheduler:
    """Holds the requests that wait and those that run, and the blocks they run in.

    The pool must hold the longest request allowed, so that the oldest can always be computed, whatever the others do.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; empty where nothing waits or runs."""
        budget = self.max_num_batched_tokens
        preemptions = self.preemptions
        chunks: list[Chunk] = []
        for request in tuple(self.running):
            if request.blocks and self._reserve(request):  # no blocks: preempted a moment ago
                budget = self._spend(request, budget, chunks)
        # What had to be preempted would not fit again yet; admitting it would only go round in a circle.
        while self.preemptions == preemptions and self._admit(budget):
            budget = self._spend(self.running[-1], budget, chunks)
        return chunks

    def retire(self, chunks: list[Chunk]) -> None:
        """Note that a step has been computed."""
        for chunk in chunks:
            chunk.request.computed = chunk.start + chunk.count

    def remove(self, request: Request) -> None:
        """Forget a request that has finished or was aborted, and free its blocks."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.pool.release(request.blocks)

    def check(self) -> None:
        """Raise LlmoptError unless every block is accounted for."""
        self.pool.check(request.blocks for request in (*self.running, *self.waiting))

    def _spend(self, request: Request, budget: int, chunks: list[Chunk]) -> int:
        """Spend what the budget allows on a request's gap; returns what is left of the budget."""
        count = min(request.known - request.computed, budget)
        if count > 0:
            chunks.append(Chunk(request, request.computed, count))
        return budget - count

    def _admit(self, budget: int) -> bool:
        """Let the request that has waited longest run, if there is room for all its known tokens."""
        if not self.waiting or budget == 0 or len(self.running) == self.max_num_seqs:
            return False
        request = self.waiting[0]
        if not self.pool.grow(request.blocks, request.known):
            return False
        self.running.append(self.waiting.popleft())
        return True

    def _reserve(self, request: Request) -> bool:
        """Get blocks for a running request's known tokens, at the cost of the newest ones; False if it was itself."""
        while not self.pool.grow(request.blocks, request.known):
            newest = self.running.pop()
            self.pool.release(newest.blocks)
            newest.computed = 0
            self.waiting.appendleft(newest)
            self.preemptions += 1
            if newest is request:
                return False
        return True
