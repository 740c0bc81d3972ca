"""The scheduler's one rule and the pool's books, under thousands of random steps."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmopt.engine.block_pool import BlockPool
from llmopt.engine.params import SamplingParams
from llmopt.engine.request import Request
from llmopt.engine.scheduler import Scheduler
from llmopt.errors import LlmoptError

BLOCKS, BLOCK_SIZE, LONGEST = 8, 4, 32


def make_request(name: str, length: int) -> Request:
    return Request(name, list(range(length)), SamplingParams(), seed=0)


def make_scheduler(blocks: int = BLOCKS, seqs: int = 4, budget: int = 10) -> Scheduler:
    return Scheduler(BlockPool(blocks, BLOCK_SIZE), seqs, budget)


def run_step(scheduler: Scheduler) -> list:
    """Compute a step with a model that always says 7."""
    chunks = scheduler.schedule()
    closing = [chunk.request for chunk in chunks if chunk.closes_gap]
    scheduler.retire(chunks)
    for request in closing:
        request.tokens.append(7)
    return chunks


class SchedulerMachine(RuleBasedStateMachine):
    """Random adds, aborts, steps and finishes; nothing is lost, nothing is computed twice or out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler()
        self.live: dict[str, Request] = {}
        self.added = 0

    @rule(length=st.integers(1, LONGEST - 1))
    def add(self, length: int) -> None:
        self.added += 1
        request = make_request(str(self.added), length)
        self.live[request.id] = request
        self.scheduler.add(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data) -> None:
        self._drop(data.draw(st.sampled_from(sorted(self.live))))

    @rule()
    def step(self) -> None:
        waiting_before = len(self.scheduler.waiting)
        preemptions = self.scheduler.preemptions
        chunks = self.scheduler.schedule()
        assert sum(chunk.count for chunk in chunks) <= self.scheduler.max_num_batched_tokens
        assert len({chunk.request.id for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            assert chunk.count > 0
            assert chunk.start == chunk.request.computed
            assert chunk.start + chunk.count <= chunk.request.known
            assert len(chunk.request.blocks) * BLOCK_SIZE >= chunk.start + chunk.count
        if self.scheduler.preemptions > preemptions:
            assert len(self.scheduler.waiting) >= waiting_before, "a step that preempts must not admit"
        assert bool(chunks) == bool(self.live), "work that is there must go on"
        self.scheduler.retire(chunks)
        for chunk in chunks:
            request = chunk.request
            if request.computed == request.known:
                request.tokens.append(7)
                if request.known > LONGEST:
                    self._drop(request.id)

    def _drop(self, name: str) -> None:
        self.scheduler.remove(self.live.pop(name))

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.scheduler.check()
        assert self.scheduler.pool.free + self.scheduler.pool.used == BLOCKS

    @invariant()
    def every_request_is_somewhere(self) -> None:
        held = [*self.scheduler.running, *self.scheduler.waiting]
        assert {request.id for request in held} == set(self.live)
        assert len(held) == len(self.live)
        assert all(not request.blocks and not request.computed for request in self.scheduler.waiting)


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    scheduler = make_scheduler(budget=10)
    scheduler.add(make_request("long", 25))
    spans = [[(c.start, c.count) for c in run_step(scheduler)] for _ in range(4)]
    assert spans == [[(0, 10)], [(10, 10)], [(20, 5)], [(25, 1)]]


def test_running_requests_decode_beside_a_new_prompt() -> None:
    scheduler = make_scheduler(budget=10)
    scheduler.add(make_request("old", 4))
    run_step(scheduler)
    scheduler.add(make_request("new", 20))
    assert [(c.request.id, c.count) for c in run_step(scheduler)] == [("old", 1), ("new", 9)]


def test_the_newest_is_preempted_and_recomputed_and_the_oldest_never_waits() -> None:
    scheduler = make_scheduler(blocks=8, budget=32)
    old, new = make_request("old", 12), make_request("new", 15)
    scheduler.add(old)
    scheduler.add(new)
    while not scheduler.preemptions:
        run_step(scheduler)
        assert old.computed == old.known - 1
    assert list(scheduler.waiting) == [new]
    assert new.computed == 0
    known = new.known
    scheduler.remove(old)
    chunks = run_step(scheduler)
    assert [(c.request.id, c.start, c.count) for c in chunks] == [("new", 0, known)]


def test_no_more_run_at_once_than_allowed() -> None:
    scheduler = make_scheduler(seqs=2, budget=30)
    for name in "abc":
        scheduler.add(make_request(name, 2))
    run_step(scheduler)
    assert [r.id for r in scheduler.running] == ["a", "b"]
    scheduler.remove(scheduler.running[0])
    run_step(scheduler)
    assert [r.id for r in scheduler.running] == ["b", "c"]


def test_lost_blocks_are_noticed() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    table: list[int] = []
    assert pool.grow(table, 9)
    assert len(table) == 3 and pool.used == 3
    assert not pool.grow([], 8), "two blocks are wanted, one is free"
    pool.check([table])
    with pytest.raises(LlmoptError, match="lost its books"):
        pool.check([table[:-1]])
    with pytest.raises(LlmoptError, match="lost its books"):
        pool.check([table, [table[0]]])
