"""The scheduler's one rule and its promises, under thousands of random steps and one by one."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmopt.engine.block_keys import BlockKeys
from llmopt.engine.block_pool import BlockPool
from llmopt.engine.params import SamplingParams
from llmopt.engine.prefill_pace import PrefillPace
from llmopt.engine.request import Request
from llmopt.engine.scheduler import MOST_OVERTAKEN, Chunk, Scheduler

BLOCKS, BLOCK_SIZE, LONGEST = 8, 4, 32
TEXTS = ([1] * LONGEST, [1] * 9 + [2] * LONGEST, list(range(LONGEST)))


def make_request(name: str, length: int, priority: int = 0) -> Request:
    return Request(name, list(range(length)), SamplingParams(), 0, priority=priority)


def make_scheduler(blocks: int = BLOCKS, seqs: int = 4, budget: int = 10, caching: bool = False) -> Scheduler:
    return Scheduler(BlockPool(blocks, BLOCK_SIZE), seqs, budget, BlockKeys(BLOCK_SIZE) if caching else None)


def run_step(scheduler: Scheduler) -> list[Chunk]:
    """Compute a step with a model that always says 7."""
    chunks = scheduler.schedule()
    closing = [chunk.request for chunk in chunks if chunk.closes_gap]
    for request in closing:
        request.tokens.append(7)
    scheduler.retire(chunks)
    return chunks


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests that share prefixes, aborts and steps: nothing is lost, nothing stale read, nobody left to wait.

    `memory` is what stands in each slot of the cache: the tokens, from their beginning, whose last one was written
    there, and the salt. What a request finds must be its own beginning.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, Request] = {}
        self.memory: dict[tuple[int, int], tuple] = {}
        self.added = self.steps = 0
        self.passed: Counter[str] = Counter()  # how many got in before a request that ranks before them
        self.tokens = 0  # the most that any request got in each step, summed
        self.returned: dict[str, int] = {}  # at how many tokens preempted ones came back, until another comes in

    @initialize(
        caching=st.sampled_from([True, True, False]),
        budget=st.integers(4, 40),
        chunk=st.sampled_from([None, 1, 3, 8]),
        prioritized=st.booleans(),
    )
    def begin(self, caching: bool, budget: int, chunk: int | None, prioritized: bool) -> None:
        self.scheduler = make_scheduler(budget=budget, caching=caching)
        self.scheduler.pace = None if chunk is None else PrefillPace(chunk)
        self.prioritized = prioritized

    @rule(
        text=st.sampled_from(TEXTS),
        shared=st.integers(0, LONGEST - 3),
        tail=st.lists(st.integers(0, 2), min_size=1, max_size=2),
        salt=st.sampled_from([None, None, "a"]),
        priority=st.integers(-1, 1),
    )
    def add(self, text: list[int], shared: int, tail: list[int], salt: str | None, priority: int) -> None:
        self.added += 1
        priority = priority if self.prioritized else 0
        request = Request(
            str(self.added), text[:shared] + tail, SamplingParams(), 0, priority=priority, cache_salt=salt
        )
        self.live[request.id] = request
        self.scheduler.add(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data) -> None:
        self._drop(data.draw(st.sampled_from(sorted(self.live))))

    @rule(steps=st.integers(1, 5))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), drafted=st.integers(0, 6), accepted=st.integers(0, 6))
    def speculate(self, data, drafted: int, accepted: int) -> None:
        """Tokens are drafted for one of those that run, and some of them accepted."""
        request = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        if request in self.scheduler.running:
            request.ahead = max(0, min(drafted, LONGEST - 1 - request.known))
            self._step({request.id: accepted})
            request.ahead = 0

    def _step(self, accepted: dict[str, int] | None = None) -> None:
        self.steps += 1
        waiting, running = list(self.scheduler.waiting), list(self.scheduler.running)
        decoding = [request for request in running if request.known - request.computed == 1]
        chunks = self.scheduler.schedule()
        self._check_who_runs(waiting, running)
        assert sum(chunk.count for chunk in chunks) <= self.scheduler.max_num_batched_tokens
        assert len({chunk.request.id for chunk in chunks}) == len(chunks)
        self._check_streams(decoding, chunks)
        assert bool(chunks) == bool(self.live), "work that is there must go on"
        for chunk in chunks:
            self._check_chunk(chunk)
        for chunk in chunks:
            chunk.request.drafts = [8] * chunk.drafted
            self._write(chunk)
        got = {chunk.request.id: self._append(chunk, accepted or {}) for chunk in chunks}
        self.scheduler.retire(chunks)
        self.tokens += max(got.values(), default=0)
        for request in [chunk.request for chunk in chunks]:
            assert len(request.blocks) <= max(self.scheduler.pool.blocks_for(request.known), 1)
            if request.known > LONGEST:
                self._drop(request.id)
        self.scheduler.check()

    def _append(self, chunk: Chunk, accepted: dict[str, int]) -> int:
        """Append what a model that says 8 to so many drafts, and else 7, has chosen; how many tokens that are."""
        if not chunk.closes_gap:
            return 0
        count = min(accepted.get(chunk.request.id, 0), chunk.drafted)
        chunk.request.tokens += [8] * count + [7]
        return count + 1

    def _check_who_runs(self, waiting: list[Request], running: list[Request]) -> None:
        let_in = [request for request in self.scheduler.running if request in waiting]
        preempted = [request for request in running if request in self.scheduler.waiting]
        assert not (let_in and preempted), "a step that preempts must not admit"
        assert preempted == [] or max(preempted, key=lambda r: r.rank) is max(running, key=lambda r: r.rank)
        for request in preempted:
            since = self.returned.pop(request.id, None)
            assert since is None or self.tokens - since >= BLOCK_SIZE, "in and out in a circle"
        for request in let_in:
            self.passed.update(other.id for other in self.scheduler.waiting if other.rank < request.rank)
            self.returned = {request.id: self.tokens} if request.preemptions else {}
        assert max(self.passed.values(), default=0) <= MOST_OVERTAKEN

    def _check_streams(self, decoding: list[Request], chunks: list[Chunk]) -> None:
        """Every stream goes on unless it was preempted, and prompts take no more beside streams than they may."""
        going = [request for request in decoding if request in self.scheduler.running]
        computed = {chunk.request.id: chunk.count - chunk.drafted for chunk in chunks}
        assert all(computed.get(request.id) == 1 for request in going)
        pace = self.scheduler.pace
        if going and pace is not None:
            assert sum(computed.values()) - len(going) <= pace.least

    def _check_chunk(self, chunk: Chunk) -> None:
        request = chunk.request
        assert chunk.count > 0
        assert chunk.start == request.computed
        assert chunk.start + chunk.count <= request.known + request.ahead
        assert chunk.closes_gap or not chunk.drafted
        assert len(request.blocks) * BLOCK_SIZE >= chunk.start + chunk.count
        for position in range(chunk.start):
            place = request.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
            assert self.memory[place] == (request.cache_salt, *request.tokens[: position + 1])

    def _write(self, chunk: Chunk) -> None:
        others = [r for r in self.live.values() if r is not chunk.request]
        for position in range(chunk.start, chunk.start + chunk.count):
            block = chunk.request.blocks[position // BLOCK_SIZE]
            assert not any(block in other.blocks for other in others), "what is shared is never written"
            text = chunk.request.tokens + chunk.request.drafts
            written = (chunk.request.cache_salt, *text[: position + 1])
            self.memory[block, position % BLOCK_SIZE] = written

    def _drop(self, name: str) -> None:
        self.scheduler.remove(self.live.pop(name))

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            pool = self.scheduler.pool
            assert pool.free + pool.used + pool.cached == BLOCKS
            assert pool.used == len({block for request in self.live.values() for block in request.blocks})

    @invariant()
    def every_request_is_somewhere(self) -> None:
        if hasattr(self, "scheduler"):
            held = [*self.scheduler.running, *self.scheduler.waiting]
            assert {request.id for request in held} == set(self.live)
            assert len(held) == len(self.live)
            assert all(not request.blocks and not request.computed for request in self.scheduler.waiting)
            for queue in (self.scheduler.running, self.scheduler.waiting):
                assert queue == sorted(queue, key=lambda request: request.rank)

    def teardown(self) -> None:
        """All that is still there comes to its end, in the steps that it would take one after the other, twice."""
        end = self.steps + 2 * len(self.live) * (2 * LONGEST + LONGEST // 4)
        while self.live:
            self._step()
            assert self.steps <= end
        if hasattr(self, "scheduler"):
            assert self.scheduler.pool.used == 0


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
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


def decoding(scheduler: Scheduler, *names: str) -> list[Request]:
    """Requests that have been taken in and decode."""
    requests = [make_request(name, 3) for name in names]
    for request in requests:
        scheduler.add(request)
    run_step(scheduler)
    return requests


def test_a_step_that_decodes_takes_in_no_more_of_prompts_than_the_chunk_size() -> None:
    scheduler = make_scheduler(blocks=16, budget=20)
    scheduler.pace = PrefillPace(6)
    old, other = decoding(scheduler, "old", "other")
    scheduler.add(make_request("new", 9))
    scheduler.add(make_request("next", 9))
    steps = [[(c.request.id, c.count) for c in run_step(scheduler)] for _ in range(4)]
    streams = [("old", 1), ("other", 1)]
    assert steps[0] == [*streams, ("new", 6)]
    assert steps[1] == [*streams, ("new", 3), ("next", 3)]
    assert steps[2] == [*streams, ("new", 1), ("next", 6)]
    scheduler.remove(old)
    scheduler.remove(other)


def test_a_step_in_which_nothing_decodes_spends_its_whole_budget_on_prompts() -> None:
    scheduler = make_scheduler(budget=20)
    scheduler.pace = PrefillPace(6)
    scheduler.add(make_request("one", 9))
    scheduler.add(make_request("two", 9))
    assert [(c.request.id, c.count) for c in run_step(scheduler)] == [("one", 9), ("two", 9)]


def test_a_prompt_is_taken_in_more_slowly_the_deeper_and_faster_beside_more_streams() -> None:
    def chunks(*streams: str) -> list[int]:
        scheduler = make_scheduler(blocks=32, seqs=8, budget=64)
        scheduler.pace = PrefillPace(4, per_stream=4, depth=16)
        decoding(scheduler, *streams)
        scheduler.add(make_request("long", 64))
        return [run_step(scheduler)[-1].count for _ in range(6)]

    assert chunks("a") == [4, 3, 2, 2, 2, 2]  # 4 / (1 + 4/16) = 3.2, 4 / (1 + 7/16) = 2.8, and so on
    assert chunks("a", "b") == [8, 5, 4, 3, 3, 3]


def test_short_prompts_are_not_held_back_and_pass_a_long_one_that_is() -> None:
    scheduler = make_scheduler(blocks=32, seqs=8, budget=30)
    scheduler.pace = PrefillPace(4, longer_than=10)
    decoding(scheduler, "a")
    scheduler.add(make_request("long", 20))
    assert [(c.request.id, c.count) for c in run_step(scheduler)] == [("a", 1), ("long", 4)]
    scheduler.add(make_request("second", 20))
    scheduler.add(make_request("short", 10))
    assert [(c.request.id, c.count) for c in run_step(scheduler)] == [("a", 1), ("long", 4), ("short", 10)]
    for _ in range(3):
        run_step(scheduler)
    assert [(c.request.id, c.count) for c in run_step(scheduler)][-1] == ("second", 4)


def test_a_prompt_however_deep_goes_on() -> None:
    scheduler = make_scheduler(blocks=32, seqs=8, budget=64)
    scheduler.pace = PrefillPace(1, depth=1)
    decoding(scheduler, "a")
    scheduler.add(make_request("long", 20))
    for step in range(20):
        assert [(c.start, c.count) for c in run_step(scheduler)[1:]] == [(step, 1)]


def test_a_prompt_takes_no_tokens_from_a_stream_however_early_it_came() -> None:
    scheduler = make_scheduler(budget=6)
    scheduler.add(make_request("stream", 3, priority=1))
    run_step(scheduler)
    scheduler.add(make_request("prompt", 20, priority=0))
    for _ in range(3):
        assert ("stream", 1) in [(c.request.id, c.count) for c in run_step(scheduler)]


def test_the_newest_is_preempted_and_recomputed_and_the_oldest_never_waits() -> None:
    scheduler = make_scheduler(blocks=8, budget=32)
    old, new = make_request("old", 12), make_request("new", 15)
    scheduler.add(old)
    scheduler.add(new)
    while not scheduler.preemptions:
        run_step(scheduler)
        assert old.computed == old.known - 1
    assert scheduler.waiting == [new]
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


def counts(chunks: list[Chunk]) -> list[tuple[str, int, int]]:
    return [(chunk.request.id, chunk.start, chunk.count) for chunk in chunks]


def make_sharing(name: str, tail: list[int], shared: int = 12, priority: int = 0) -> Request:
    return Request(name, [*range(shared), *tail], SamplingParams(), 0, priority=priority)


def test_a_shared_prefix_is_computed_once_by_requests_that_come_together() -> None:
    scheduler = make_scheduler(blocks=40, budget=100, caching=True)
    for name in "abcd":
        scheduler.add(make_sharing(name, [ord(name)] * 3))
    assert counts(run_step(scheduler)) == [("a", 0, 15)]
    assert counts(run_step(scheduler)) == [("a", 15, 1), *((name, 12, 3) for name in "bcd")]
    assert (scheduler.queried, scheduler.found) == (60, 36)
    assert [request.cached_tokens for request in scheduler.running] == [0, 12, 12, 12]


def test_only_the_block_that_is_needed_next_is_waited_for() -> None:
    scheduler = make_scheduler(blocks=40, budget=8, caching=True)
    scheduler.add(make_sharing("long", [50] * 30))
    scheduler.add(make_sharing("short", [60], shared=8))
    scheduler.add(make_request("other", 1, priority=1))
    assert counts(run_step(scheduler)) == [("long", 0, 8)]
    scheduler.max_num_batched_tokens = 12
    assert counts(run_step(scheduler)) == [("long", 8, 12)]
    scheduler.max_num_batched_tokens = 30
    assert counts(run_step(scheduler)) == [("long", 20, 22), ("short", 8, 1), ("other", 0, 1)]


def test_others_pass_a_request_that_waits_for_a_prefix() -> None:
    scheduler = make_scheduler(blocks=40, budget=20, caching=True)
    scheduler.add(make_sharing("a", [50]))
    scheduler.add(make_sharing("b", [60]))
    scheduler.add(Request("c", [99] * 4, SamplingParams(), 0))
    assert counts(run_step(scheduler)) == [("a", 0, 13), ("c", 0, 4)]


def test_who_waits_for_a_prefix_computes_it_when_its_owner_is_aborted() -> None:
    scheduler = make_scheduler(blocks=40, budget=8, caching=True)
    first, second = make_sharing("a", [50]), make_sharing("b", [60])
    scheduler.add(first)
    scheduler.add(second)
    assert counts(run_step(scheduler)) == [("a", 0, 8)]
    scheduler.remove(first)
    assert counts(run_step(scheduler)) == [("b", 8, 5)], "and what was computed is not lost"


def test_who_waits_for_a_prefix_goes_on_after_its_owner_was_preempted() -> None:
    scheduler = make_scheduler(blocks=10, budget=6, caching=True)
    oldest = Request("oldest", [99] * 4, SamplingParams(), 0)
    owner, waits = make_sharing("owner", [50] * 5, shared=24), make_sharing("waits", [60], shared=24)
    for request in (oldest, owner, waits):
        scheduler.add(request)
    while not owner.preemptions:
        assert not waits.blocks
        run_step(scheduler)
    assert scheduler.pool.cached == 5, "what was computed of the owner's prompt"
    scheduler.remove(oldest)
    assert counts(run_step(scheduler)) == [("owner", 20, 6)]
    assert counts(run_step(scheduler)) == [("owner", 26, 3), ("waits", 24, 1)]


def test_nobody_waits_for_a_prefix_of_one_that_ranks_behind() -> None:
    """What keeps the owner from the budget might keep it from it for ever."""
    scheduler = make_scheduler(blocks=40, budget=8, caching=True)
    scheduler.add(make_sharing("behind", [50], priority=1))
    run_step(scheduler)
    scheduler.max_num_batched_tokens = 20
    scheduler.add(make_sharing("before", [60]))
    assert counts(run_step(scheduler)) == [("behind", 8, 5), ("before", 8, 5)]


def test_nobody_waits_for_what_has_been_computed_and_cannot_be_found() -> None:
    """The last block of a prompt that ends with it is computed although it is there, and then stands there twice."""
    scheduler = make_scheduler(blocks=4, budget=100, caching=True)
    first = make_request("first", 4)
    scheduler.add(first)
    run_step(scheduler)
    scheduler.remove(first)
    scheduler.add(make_request("second", 4))
    run_step(scheduler)
    filler = Request("filler", [99] * 8, SamplingParams(), 0)  # takes the place of the first's block
    scheduler.add(filler)
    run_step(scheduler)
    scheduler.remove(filler)
    scheduler.add(make_request("third", 6))
    assert ("third", 0, 6) in counts(run_step(scheduler))


def test_the_last_token_is_always_computed() -> None:
    scheduler = make_scheduler(blocks=40, budget=100, caching=True)
    for name in "ab":
        scheduler.add(make_request(name, 12))
        chunks = run_step(scheduler)
    assert counts(chunks) == [("a", 12, 1), ("b", 8, 4)]


def test_samples_of_a_prompt_compute_it_once_but_for_the_last_block() -> None:
    scheduler = make_scheduler(blocks=40, budget=100, caching=True)
    for name in "abc":
        scheduler.add(make_request(name, 14))
    assert counts(run_step(scheduler)) == [("a", 0, 14)]
    assert counts(run_step(scheduler))[1:] == [("b", 12, 2), ("c", 12, 2)]
    scheduler.check()
    assert scheduler.pool.used == 3 + 3 * 1, "b and c hold a's three full blocks"


def test_output_is_found_too() -> None:
    scheduler = make_scheduler(blocks=40, budget=100, caching=True)
    first = make_request("a", 3)
    scheduler.add(first)
    for _ in range(7):
        run_step(scheduler)
    scheduler.remove(first)
    scheduler.add(Request("b", [*first.tokens, 1, 2], SamplingParams(), 0))
    assert counts(run_step(scheduler)) == [("b", 8, 4)]


def test_salts_keep_requests_apart() -> None:
    scheduler = make_scheduler(blocks=40, budget=100, caching=True)
    for number, salt in enumerate((None, "a", "b", "a", None)):
        request = Request(str(number), list(range(14)), SamplingParams(), 0, cache_salt=salt)
        scheduler.add(request)
        run_step(scheduler)
        assert request.cached_tokens == (0 if number < 3 else 12)
        scheduler.remove(request)


def test_a_preempted_request_finds_what_is_left_of_its_blocks() -> None:
    scheduler = make_scheduler(blocks=8, budget=32, caching=True)
    old, new = make_request("old", 12), Request("new", [50] * 15, SamplingParams(), 0)
    scheduler.add(old)
    scheduler.add(new)
    while not scheduler.preemptions:
        run_step(scheduler)
        assert old.computed == old.known - 1
    assert scheduler.waiting == [new]
    scheduler.remove(old)
    known = new.known
    assert counts(run_step(scheduler)) == [("new", 16, known - 16)]
    assert (scheduler.queried, new.cached_tokens) == (27, 0), "what is found after a preemption does not count"


def test_small_requests_pass_one_that_does_not_fit_but_not_for_ever() -> None:
    scheduler = make_scheduler(blocks=8, budget=100)
    holder, large = make_request("holder", 11), make_request("large", 24)
    scheduler.add(holder)
    run_step(scheduler)
    scheduler.add(large)
    first_chunks = []
    for number in range(100):  # one small request comes in each step, and runs for two
        scheduler.add(make_request(f"small {number}", 3))
        first_chunks += [chunk.request.id for chunk in run_step(scheduler) if chunk.start == 0]
        for request in [r for r in scheduler.running if r.id.startswith("small") and r.known == 5]:
            scheduler.remove(request)
        holder.tokens[12:] = []  # it keeps its three blocks
        holder.computed = min(holder.computed, 11)
        if number == 60:
            scheduler.remove(holder)
        if large.blocks:
            break
    assert first_chunks.index("large") == MOST_OVERTAKEN


def test_a_prompt_that_fits_only_alone_gets_in_beside_endless_small_ones() -> None:
    scheduler = make_scheduler(blocks=8, budget=100)
    small = 0
    large = make_request("large", LONGEST - 1)
    for step in range(200):
        while len(scheduler.waiting) < 4:
            small += 1
            scheduler.add(make_request(f"small {small}", 5))
        if step == 3:
            scheduler.add(large)
        run_step(scheduler)
        for request in [r for r in scheduler.running if r.known > 9 and r is not large]:
            scheduler.remove(request)
        if large.blocks:
            break
    assert large.computed == LONGEST - 1


def test_a_preempted_request_comes_back_only_where_it_can_stay() -> None:
    scheduler = make_scheduler(blocks=13, seqs=8, budget=100)
    old, small, new = make_request("old", 13), make_request("small", 3), make_request("new", 26)
    for request in (old, small, new):
        scheduler.add(request)
        run_step(scheduler)
    while not new.preemptions:
        run_step(scheduler)
    scheduler.remove(small)
    scheduler.add(make_request("newest", 3))
    for _ in range(BLOCK_SIZE):
        assert counts(run_step(scheduler)) == [("old", old.known - 2, 1)]
        assert scheduler.pool.free >= scheduler.pool.blocks_for(new.known), "it would fit until old takes another block"
    scheduler.remove(old)
    assert [chunk.request.id for chunk in run_step(scheduler)] == ["new", "newest"], "and nobody passed it"


def test_priorities() -> None:
    scheduler = make_scheduler(blocks=40, seqs=2, budget=100)
    for name, priority in (("late", 5), ("b", 0), ("c", 0), ("first", -3)):
        scheduler.add(make_request(name, 3, priority))
    assert [chunk.request.id for chunk in run_step(scheduler)] == ["first", "b"]
    scheduler.remove(scheduler.running[0])
    assert [chunk.request.id for chunk in run_step(scheduler)] == ["b", "c"]


def test_the_lowest_priority_is_preempted_however_old_it_is() -> None:
    scheduler = make_scheduler(blocks=8, budget=32)
    old, new = make_request("old", 12, priority=1), make_request("new", 12)
    scheduler.add(old)
    run_step(scheduler)
    scheduler.add(new)
    while not scheduler.preemptions:
        run_step(scheduler)
    assert scheduler.waiting == [old] and scheduler.running == [new]


def test_drafted_tokens_take_what_is_left_over_and_are_taken_back() -> None:
    scheduler = make_scheduler(blocks=8, budget=10)
    first, second = make_request("first", 7), make_request("second", 3)
    for request in (first, second):
        scheduler.add(request)
    run_step(scheduler)
    first.ahead, second.ahead = 6, 6
    chunks = scheduler.schedule()
    assert [(c.start, c.count, c.drafted) for c in chunks] == [(7, 7, 6), (3, 3, 2)], "8 of the budget are left over"
    assert (len(first.blocks), len(second.blocks)) == (4, 2)
    first.drafts, second.drafts = [8] * 6, [8] * 2
    assert chunks[0].tokens == [7, 8, 8, 8, 8, 8, 8]
    first.tokens += [8, 8, 7]  # two of them are accepted
    second.tokens += [7]
    scheduler.retire(chunks)
    assert (first.computed, second.computed) == (10, 4)
    assert (len(first.blocks), len(second.blocks)) == (3, 2)
    assert first.drafts == second.drafts == []
    scheduler.check()


def test_nobody_is_preempted_or_kept_out_for_drafted_tokens() -> None:
    scheduler = make_scheduler(blocks=8, budget=40)
    first = make_request("first", 15)
    scheduler.add(first)
    run_step(scheduler)
    scheduler.add(make_request("second", 16))
    first.ahead = 6
    assert [(c.request.id, c.count, c.drafted) for c in scheduler.schedule()] == [("first", 1, 0), ("second", 16, 0)]
    assert scheduler.preemptions == 0
    assert scheduler.pool.free == 0


def test_only_accepted_tokens_are_found_again() -> None:
    scheduler = make_scheduler(blocks=40, budget=100, caching=True)
    first = make_request("first", 3)
    scheduler.add(first)
    run_step(scheduler)
    first.ahead, first.drafts = 9, [8] * 9
    chunks = scheduler.schedule()
    first.tokens += [8, 8, 8, 8, 8, 7]  # known: three of the prompt, 7, five accepted, 7
    scheduler.retire(chunks)
    scheduler.remove(first)
    scheduler.add(Request("same", [0, 1, 2, 7, 8, 8, 8, 8, 8, 7, 1, 1, 1], SamplingParams(), 0))
    assert counts(run_step(scheduler)) == [("same", 8, 5)], "two blocks hold what was accepted"
    scheduler.add(Request("drafted", [0, 1, 2, 7, *[8] * 9], SamplingParams(), 0))
    assert ("drafted", 8, 5) in counts(run_step(scheduler)), "and what was drafted and rejected is nowhere"
