"""Decides what each step computes.

There is one rule. A request has a number of tokens *known* and a number *computed*; each step spends a budget of tokens
on closing these gaps, running requests first, in the order of their rank (priority, then arrival). A new prompt, a
chunk of a long one, one decoded token and the recomputation after a preemption are all the same thing under that rule
(Agrawal et al. 2023, arXiv:2308.16369); with a prefix that is found in the cache, `computed` begins higher. Tokens that
somebody has drafted make the gap longer, where budget and blocks are left over, and are taken back if they turn out
wrong: they take nothing from anybody.

Who decodes comes first, so that no prompt takes the budget from a stream; and a step that decodes takes in prompts at a
pace (`prefill_pace.py`), so that none of them makes it long (Agrawal et al. 2024, arXiv:2403.02310). Who of those that
wait may enter at all is for an admission policy to say (`admission.py`).

What is promised to requests, as long as each of them ends some time:
- Every one gets in, unless there is no end of those with a higher priority. One that does not fit now lets those behind
  it in before it, but only MOST_OVERTAKEN of them, and none once it has been preempted.
- Every one that runs goes on: whose rank is first is never preempted, and the pool holds the longest request.
- Nobody goes in and out in a circle: a step that preempts lets nobody in, and one that was preempted comes back only
  where every running request could take another block at once.
- Nobody waits for another in a circle: a request outside the batch may wait for one inside it that ranks before it and
  is computing the block which it needs next. If that one is aborted or preempted, it is inside no more.
"""

from bisect import insort
from dataclasses import dataclass, replace

from llmopt.engine.admission import Admission, Continuous
from llmopt.engine.block_keys import BlockKeys
from llmopt.engine.block_pool import BlockPool
from llmopt.engine.prefill_pace import PrefillPace
from llmopt.engine.request import Request

MOST_OVERTAKEN = 16
"""Requests that may be let in before one that ranks before them but has to wait."""
MOST_PASSED = 8
"""Requests that did not get in after which a step looks no further down the queue."""


@dataclass(frozen=True)
class Chunk:
    """The tokens of one request that a step computes: `count` of them from position `start`, of which the last
    `drafted` are not known but drafted."""

    request: Request
    start: int
    count: int
    drafted: int = 0

    @property
    def tokens(self) -> list[int]:
        """The tokens themselves; the drafted ones must be there by now."""
        request, end = self.request, self.start + self.count
        known = request.tokens[self.start : end]
        if len(known) == self.count:
            return known
        return known + request.drafts[max(0, self.start - request.known) : end - request.known]

    def with_drafts(self, count: int) -> "Chunk":
        """With so many drafted tokens, no more than there was room for."""
        return replace(self, count=self.count - self.drafted + count, drafted=count)

    @property
    def closes_gap(self) -> bool:
        """Whether the request's last known token is among them, so that the next one can be sampled."""
        return self.start + self.count - self.drafted == self.request.known


class Scheduler:
    """Holds the requests that wait and those that run, and the blocks they run in.

    The pool must hold the longest request allowed, so that the first can always be computed, whatever the others do.

    Attributes:
        keys: how full blocks are found again; None computes every request from its beginning.
        pace: of prompts in a step in which streams decode; None for no limit but the budget.
        admission: the policy that says who of those that wait may enter.
        waiting, running: in the order of their rank.
        queried, found: tokens that were looked for in the cache, and those of them that were found.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        keys: BlockKeys | None = None,
        pace: PrefillPace | None = None,
        admission: Admission | None = None,
    ) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.keys = keys
        self.pace = pace
        self.admission = admission or Continuous()
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = self.queried = self.found = 0
        self._arrivals = 0

    def add(self, request: Request) -> None:
        self._arrivals += 1
        request.arrival = self._arrivals
        if self.keys is not None:
            self.keys.catch_up(request)
        self.admission.add(request)
        insort(self.waiting, request, key=_rank)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; empty where nothing runs and nobody waits that may enter."""
        budget = _Budget(self.max_num_batched_tokens)
        preemptions = self.preemptions
        # No blocks: preempted a moment ago. Who is kept here stays, since only those behind it are preempted after it.
        running = [request for request in tuple(self.running) if request.blocks and self._reserve(request)]
        chunks: list[Chunk] = []
        for request in filter(_decodes, running):
            self._spend(request, budget, chunks)
        if chunks and self.pace is not None:
            budget.pace, budget.work = self.pace, self.pace.work(len(chunks))
        for request in running:
            if not _decodes(request):
                self._spend(request, budget, chunks)
        if self.preemptions == preemptions:
            self._admit(budget, chunks)
        self._lengthen(chunks)
        return chunks

    def retire(self, chunks: list[Chunk]) -> None:
        """Note that a step has been computed, and that what was chosen in it has been appended to the known tokens.

        Drafted tokens have been computed where they are known now. What the others were written to is as good as empty.
        """
        for chunk in chunks:
            request = chunk.request
            request.computed = min(chunk.start + chunk.count, request.known - 1)  # the last was chosen, not computed
            if chunk.drafted:
                request.drafts = []
                self.pool.release(request.blocks, keep=self.pool.blocks_for(request.known))
            if self.keys is not None:
                self._name_blocks(chunk, self.keys)

    def remove(self, request: Request) -> None:
        """Forget a request that has finished or was aborted, and give up its blocks."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.admission.remove(request)
        self.pool.release(request.blocks)

    @property
    def pause(self) -> float:
        """Seconds for which there is nothing to compute, unless something is added or removed."""
        return 0.0 if self.running else self.admission.pause(self.waiting)

    def check(self) -> None:
        """Raise LlmoptError unless every block is accounted for."""
        self.pool.check(request.blocks for request in (*self.running, *self.waiting))

    def _spend(self, request: Request, budget: "_Budget", chunks: list[Chunk]) -> None:
        """Spend what the budget allows on a request's gap."""
        count = budget.take(request)
        if count > 0:
            chunks.append(Chunk(request, request.computed, count))

    def _reserve(self, request: Request) -> bool:
        """Get blocks for a running request's known tokens, at the cost of the last ones; False if it was itself."""
        while not self.pool.grow(request.blocks, request.known):
            last = self.running.pop()
            self.pool.release(last.blocks)
            last.computed = last.ahead = 0
            last.preemptions += 1
            insort(self.waiting, last, key=_rank)
            self.preemptions += 1
            if last is request:
                return False
        return True

    def _admit(self, budget: "_Budget", chunks: list[Chunk]) -> None:
        """Let in whom there is room for, in order, and spend what is left of the budget on them."""
        passed: list[Request] = []  # those that did not get in
        for request in self.admission.select(self.waiting)[: self.max_num_seqs + MOST_PASSED]:
            if budget.tokens == 0 or len(self.running) == self.max_num_seqs:
                return
            if len(passed) == MOST_PASSED or any(_must_be_next(one) for one in passed):
                return
            if self._let_in(request):
                self._spend(request, budget, chunks)
                for one in passed:
                    one.overtaken += 1
            else:
                passed.append(request)

    def _let_in(self, request: Request) -> bool:
        """Let a waiting request run, if there is room for all its known tokens less those that are in the cache.

        Its last known token is always computed, because its logits are wanted. So samples of one prompt share all but
        the last block of it, which each computes for itself: at most `block_size` tokens in a step that is taken
        anyway, in place of an operation on every backend that copies a block before it is written.
        """
        full = 0 if request.skip_reading_prefix_cache else (request.known - 1) // self.pool.block_size
        wanted = request.keys[:full]
        found = self.pool.find(wanted)
        if len(found) < len(wanted) and self._is_under_way(request, len(found)):
            return False
        spare = len(self.running) + 1 if request.preemptions and self.running else 0
        if not self.pool.grow(request.blocks, request.known, found, spare):
            return False
        request.computed = len(found) * self.pool.block_size
        self.waiting.remove(request)
        insort(self.running, request, key=_rank)
        if self.keys is not None and not (request.preemptions or request.skip_reading_prefix_cache):
            request.cached_tokens = request.computed
            self.queried += request.known
            self.found += request.computed
        return True

    def _lengthen(self, chunks: list[Chunk]) -> None:
        """Spend what is left of the budget on tokens that are to be drafted, in blocks that nobody holds."""
        budget = self.max_num_batched_tokens - sum(chunk.count for chunk in chunks)
        for place, chunk in enumerate(chunks):
            request = chunk.request
            count = min(request.ahead, budget) if chunk.closes_gap else 0
            if count > 0 and self.pool.grow(request.blocks, request.known + count):
                chunks[place] = Chunk(request, chunk.start, chunk.count + count, drafted=count)
                budget -= count

    def _is_under_way(self, request: Request, place: int) -> bool:
        """Whether a running request that ranks before this one is going to compute the same block at this place."""
        key, end = request.keys[place], (place + 1) * self.pool.block_size
        return any(
            other.computed < end and len(other.keys) > place and other.keys[place] == key and other.rank < request.rank
            for other in self.running
        )

    def _name_blocks(self, chunk: Chunk, keys: BlockKeys) -> None:
        """Let the blocks that a chunk has filled be found."""
        request, size = chunk.request, self.pool.block_size
        first, last = chunk.start // size, request.computed // size
        if first < last:
            keys.catch_up(request)
            for place in range(first, last):
                self.pool.name(request.blocks[place], request.keys[place])


@dataclass
class _Budget:
    """What a step has left to spend: tokens, and work at a pace where it has one."""

    tokens: int
    pace: PrefillPace | None = None
    work: float = 0.0

    def take(self, request: Request) -> int:
        """Tokens for a request's gap. With a pace, the first one that it holds back gets at least one."""
        count = min(request.known - request.computed, self.tokens)
        if self.pace is not None and self.pace.holds_back(request.known):
            cost = self.pace.cost(request.computed)
            count = min(count, max(1, int(self.work / cost))) if self.work >= 1 else 0
            self.work -= count * cost
        self.tokens -= count
        return count


def _decodes(request: Request) -> bool:
    """Whether nothing but the token sampled last is still to be computed."""
    return request.known - request.computed == 1


def _must_be_next(request: Request) -> bool:
    """Whether nobody who ranks behind a request may get in before it any more."""
    return request.preemptions > 0 or request.overtaken >= MOST_OVERTAKEN


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
