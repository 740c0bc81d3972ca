"""Who may enter when, under each policy and by a clock that the test winds; and that nobody waits for ever."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.engine.admission import Admission, Continuous, Dynamic, Static, admission_of
from llmopt.engine.block_pool import BlockPool
from llmopt.engine.params import SamplingParams
from llmopt.engine.request import Request
from llmopt.engine.scheduler import Scheduler

WINDOW = 0.5


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_scheduler(admission: Admission, seqs: int = 3, blocks: int = 64, budget: int = 64) -> Scheduler:
    return Scheduler(BlockPool(blocks, 4), seqs, budget, admission=admission)


def add(scheduler: Scheduler, *names: str, length: int = 4) -> list[Request]:
    requests = [Request(name, [1] * length, SamplingParams(), 0) for name in names]
    for request in requests:
        scheduler.add(request)
    return requests


def step(scheduler: Scheduler) -> list[str]:
    """Compute a step; who took part."""
    chunks = scheduler.schedule()
    scheduler.retire(chunks)
    for chunk in chunks:
        if chunk.closes_gap:
            chunk.request.tokens.append(7)
    return [chunk.request.id for chunk in chunks]


def test_continuous_lets_everyone_in_at_once() -> None:
    scheduler = make_scheduler(Continuous())
    add(scheduler, "a")
    assert step(scheduler) == ["a"]
    add(scheduler, "b")
    assert step(scheduler) == ["a", "b"]
    assert scheduler.pause == 0


def test_static_lets_nobody_in_until_the_last_of_a_batch_has_ended() -> None:
    scheduler = make_scheduler(Static(3))
    a, b, c, d = add(scheduler, "a", "b", "c", "d")
    assert step(scheduler) == ["a", "b", "c"]
    add(scheduler, "e")
    scheduler.remove(a)
    scheduler.remove(c)
    assert step(scheduler) == ["b"]
    scheduler.remove(b)
    assert step(scheduler) == ["d", "e"]
    scheduler.remove(d)


def test_static_takes_what_is_there_and_waits_for_no_more() -> None:
    scheduler = make_scheduler(Static(3))
    (a,) = add(scheduler, "a")
    assert step(scheduler) == ["a"]
    add(scheduler, "b")
    assert step(scheduler) == ["a"]
    scheduler.remove(a)
    assert step(scheduler) == ["b"]


def test_a_member_that_found_no_room_enters_before_the_next_batch() -> None:
    scheduler = make_scheduler(Static(3), blocks=8)
    a, b = add(scheduler, "a", "b", length=19)  # five blocks each, of eight
    assert step(scheduler) == ["a"]
    add(scheduler, "small")
    assert step(scheduler) == ["a"], "there is room for one that is no member"
    scheduler.remove(a)
    assert step(scheduler) == ["b"]
    scheduler.remove(b)
    assert step(scheduler) == ["small"]


def test_a_batch_whose_members_were_all_aborted_is_over() -> None:
    scheduler = make_scheduler(Static(2))
    a, b, _ = add(scheduler, "a", "b", "c")
    scheduler.schedule()
    scheduler.remove(a)
    scheduler.remove(b)
    assert step(scheduler) == ["c"]


def test_dynamic_waits_for_a_batch_to_fill() -> None:
    clock = Clock()
    scheduler = make_scheduler(Dynamic(3, WINDOW, clock))
    add(scheduler, "a", "b")
    assert step(scheduler) == []
    assert scheduler.pause == WINDOW
    add(scheduler, "c")
    assert scheduler.pause == 0
    assert step(scheduler) == ["a", "b", "c"]


def test_dynamic_waits_no_longer_than_its_window_from_the_first_arrival() -> None:
    clock = Clock()
    scheduler = make_scheduler(Dynamic(3, WINDOW, clock))
    add(scheduler, "a")
    clock.now += 0.375
    add(scheduler, "b")
    assert scheduler.pause == 0.125
    assert step(scheduler) == []
    clock.now += 0.125
    assert scheduler.pause == 0
    assert step(scheduler) == ["a", "b"]


def test_the_window_of_an_aborted_request_goes_with_it() -> None:
    clock = Clock()
    scheduler = make_scheduler(Dynamic(3, WINDOW, clock))
    (a,) = add(scheduler, "a")
    clock.now += 0.375
    add(scheduler, "b")
    scheduler.remove(a)
    assert scheduler.pause == WINDOW


def test_what_waited_through_a_batch_waits_for_no_window() -> None:
    clock = Clock()
    scheduler = make_scheduler(Dynamic(1, WINDOW, clock))
    (a,) = add(scheduler, "a")
    assert step(scheduler) == ["a"]
    scheduler.admission.limit = 2
    add(scheduler, "b")
    clock.now += WINDOW
    assert step(scheduler) == ["a"], "the batch has not ended"
    scheduler.remove(a)
    assert step(scheduler) == ["b"]


def test_a_window_of_nothing_is_static() -> None:
    scheduler = make_scheduler(Dynamic(3, 0.0, Clock()))
    add(scheduler, "a")
    assert step(scheduler) == ["a"]
    add(scheduler, "b")
    assert step(scheduler) == ["a"]


def test_policies_go_by_their_names() -> None:
    assert isinstance(admission_of("continuous", 4, WINDOW), Continuous)
    assert type(admission_of("static", 4, WINDOW)) is Static
    dynamic = admission_of("dynamic", 4, WINDOW)
    assert isinstance(dynamic, Dynamic) and (dynamic.limit, dynamic.window) == (4, WINDOW)


_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 20)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("wait"), st.floats(0, 1)),
    ),
    max_size=60,
)


@pytest.mark.parametrize("name", ["continuous", "static", "dynamic"])
@settings(max_examples=100, deadline=None)
@given(events=_EVENTS, seqs=st.integers(1, 4))
def test_batches_never_mix_and_every_request_ends(name: str, events: list, seqs: int) -> None:
    """Arrivals, aborts and steps in any order, in a pool that is too small for all, against the policy in three lines:
    a batch begins when the last has ended and, under dynamic, it is full or its window is over."""
    clock = Clock()
    policy = Dynamic(seqs, WINDOW, clock) if name == "dynamic" else admission_of(name, seqs, 0)
    scheduler = make_scheduler(policy, seqs, blocks=8, budget=12)
    live: dict[str, Request] = {}
    came: dict[str, float] = {}
    members: set[str] = set()

    def go() -> None:
        nonlocal members
        members &= set(live)
        is_due = name != "dynamic" or len(live) >= seqs or any(came[one] + WINDOW <= clock.now for one in live)
        if not members and is_due:
            members = set(list(live)[:seqs])
        expected = set(live) if name == "continuous" else members
        took_part = set(step(scheduler))
        assert took_part <= expected
        assert bool(took_part) == bool(expected)
        scheduler.check()
        for request in list(live.values()):
            if request.known > 26:
                scheduler.remove(live.pop(request.id))

    for number, (event, value) in enumerate(events):
        if event == "add":
            (live[str(number)],) = add(scheduler, str(number), length=value)
            came[str(number)] = clock.now
        elif event == "step":
            for _ in range(value):
                go()
        elif event == "abort" and live:
            scheduler.remove(live.pop(sorted(live)[value % len(live)]))
        elif event == "wait":
            clock.now += value
    steps = 0
    while live:
        assert scheduler.pause <= WINDOW
        clock.now += scheduler.pause
        go()
        steps += 1
        assert steps <= 60 * 40
