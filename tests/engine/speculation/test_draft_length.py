"""The number of drafted tokens follows acceptance and load, and what it costs to find out is bounded."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.engine.params import SamplingParams
from llmopt.engine.request import Request
from llmopt.engine.speculation.acceptance_rate import AcceptanceRate
from llmopt.engine.speculation.confidence import Confidence
from llmopt.engine.speculation.draft_length import Candidate, DraftLength
from llmopt.engine.speculation.linear_cost import LinearCost

MOST = 8


def make_requests(count: int) -> list[Request]:
    return [Request(str(number), [1], SamplingParams(), 0) for number in range(count)]


class Machine:
    """A pretended engine: a step takes what `step` says, a pass of the drafter what `drafter` says, and a drafted token
    of a request is accepted with its own probability."""

    def __init__(self, step, drafter=lambda rows: 0.0, lag: int = 0) -> None:
        self.step, self.drafter, self.lag = step, drafter, lag
        self.length = DraftLength(drafter)
        self.random = random.Random(1)
        self.tokens = self.seconds = 0.0

    def run(self, steps: int, requests: list[Request], acceptance: list[float]) -> list[float]:
        """The mean number drafted for each request."""
        drafted = [0] * len(requests)
        self.tokens = self.seconds = 0.0
        for _ in range(steps):
            candidates = [Candidate(request, MOST, 1000, self.lag) for request in requests]
            lengths = self.length.choose(candidates, len(requests))
            for place, count in enumerate(lengths):
                if count:
                    good = 0
                    while good < count and self.random.random() < acceptance[place]:
                        good += 1
                    self.length.observe(requests[place], count, good)
                    self.tokens += good
                    drafted[place] += count
            self.tokens += len(requests)
            rows = len(requests) + sum(lengths)
            taken = self.step(rows) * self.random.uniform(0.95, 1.05)
            self.length.observe_step(rows, taken)
            passes = [sum(length > depth for length in lengths) for depth in range(max(lengths))]
            self.seconds += taken + sum(
                self.drafter(rows + self.lag * (depth == 0)) for depth, rows in enumerate(passes)
            )
        return [count / steps for count in drafted]

    def speedup(self, requests: int) -> float:
        """Over the last run, against decoding one by one."""
        return self.tokens / self.seconds * self.step(requests) / requests


def bound_by_memory(rows: int) -> float:
    return 0.010 + 0.0005 * rows


def bound_by_both(rows: int) -> float:
    return 0.010 + 0.001 * rows


@settings(deadline=None)
@given(st.floats(1e-4, 1e-2), st.floats(0, 1e-3), st.lists(st.integers(1, 50), min_size=2, max_size=40))
def test_a_line_is_found(base, slope, rows) -> None:
    cost = LinearCost()
    cost.observe(1, 1.0)  # the first finds nothing in the caches
    for count in rows:
        cost.observe(count, base + slope * count)
    if len(set(rows)) > 1:
        assert cost(20) == pytest.approx(base + slope * 20, rel=1e-6)
    assert cost(rows[-1]) == pytest.approx(base + slope * rows[-1], rel=1e-6)


def test_a_line_forgets_and_outliers_hardly_count() -> None:
    cost = LinearCost()
    for turn in range(600):
        cost.observe(1 + turn % 5, (0.02 if turn < 200 else 0.01) + 0.001 * (1 + turn % 5))
    assert cost(3) == pytest.approx(0.013, rel=0.05)
    cost.observe(3, 5.0)
    assert cost(3) < 0.015


def test_nothing_is_known_before_a_step_and_more_rows_are_tried() -> None:
    cost = LinearCost()
    assert not cost.known and cost(4) == 0
    cost.observe(1, 0.2)
    assert not cost.known
    cost.observe(1, 0.01)
    assert cost(9) == pytest.approx(0.01)


def test_a_rate_follows_and_what_comes_after_a_rejection_does_not_count() -> None:
    rate = AcceptanceRate(0.9, 0.5)
    for _ in range(60):
        rate.observe(8, 0)
    assert rate.value < 0.01
    for _ in range(60):
        rate.observe(8, 4)  # four in five
    assert rate.value == pytest.approx(0.8, abs=0.1)


def test_drafts_that_pay_are_long() -> None:
    machine, requests = Machine(bound_by_memory), make_requests(1)
    assert machine.run(300, requests, [0.95])[0] > 5
    assert machine.speedup(1) > 2.5


def test_drafts_that_do_not_pay_go_to_zero_and_cost_next_to_nothing() -> None:
    machine, requests = Machine(bound_by_memory), make_requests(1)
    machine.run(100, requests, [0.0])
    assert machine.run(500, requests, [0.0])[0] < 0.3
    assert machine.speedup(1) > 0.98


def test_a_draft_model_that_does_not_pay_goes_to_zero() -> None:
    machine, requests = Machine(bound_by_memory, lambda rows: 0.006 + 0.0003 * rows, lag=3), make_requests(1)
    machine.run(50, requests, [0.2])
    assert machine.run(500, requests, [0.2])[0] < 0.03
    assert machine.speedup(1) > 0.98


def test_a_new_request_begins_with_what_others_had() -> None:
    machine = Machine(bound_by_memory)
    for request in make_requests(20):
        drafted = machine.run(30, [request], [0.0])
    assert drafted[0] < 0.3


def test_each_request_has_what_is_its_own() -> None:
    machine, requests = Machine(bound_by_memory), make_requests(4)
    machine.run(50, requests, [0.95, 0.0, 0.95, 0.0])
    good, bad, again, worse = machine.run(300, requests, [0.95, 0.0, 0.95, 0.0])
    assert min(good, again) > 4 and max(bad, worse) < 0.3


def test_under_load_there_are_fewer() -> None:
    alone = Machine(bound_by_both).run(300, make_requests(1), [0.7])[0]
    machine = Machine(bound_by_both)
    machine.run(100, make_requests(64), [0.7] * 64)
    crowd = machine.run(200, make_requests(64), [0.7] * 64)
    assert sum(crowd) / 64 < 0.1 and alone > 1
    assert machine.speedup(64) > 0.97


def test_it_comes_back_when_drafts_pay_again() -> None:
    machine, requests = Machine(bound_by_memory), make_requests(1)
    machine.run(500, requests, [0.0])
    machine.run(100, requests, [1.0])
    assert machine.run(100, requests, [1.0])[0] > 5


def test_nobody_catches_up_for_a_few_tokens() -> None:
    machine = Machine(bound_by_memory, lambda rows: 0.003 + 0.0005 * rows)
    machine.run(50, make_requests(1), [0.9])
    (request,) = make_requests(1)
    assert machine.length.choose([Candidate(request, MOST, 10, lag=1000)], 1) == [0]
    assert machine.length.choose([Candidate(request, MOST, 1000, lag=1000)], 1)[0] > 0


def test_confidence_is_what_became_of_tokens_that_were_found_so_likely() -> None:
    confidence = Confidence()
    for turn in range(400):
        confidence.observe([0.95, 0.1, 0.999], turn % 2)  # of the second half the second was wrong
    assert confidence([0.93]) == pytest.approx(0.5, abs=0.02)
    assert confidence([0.15]) < 0.02
    assert confidence([0.999]) == Confidence()([0.999])  # never came to it
    assert confidence([0.93, 0.93]) == pytest.approx(0.25, abs=0.02)
    assert confidence([]) == 1 and 0 < confidence([0.0]) < confidence([1.0])


def speedup_of_a_drafter_with_doubts(by_confidence: bool) -> float:
    """Of one whose tokens are sure in seven cases of ten and guesses in the others, and that knows which."""
    step, drafter = bound_by_memory, lambda rows: 0.004 + 0.0001 * rows
    length, source = DraftLength(drafter, by_confidence=by_confidence), random.Random(5)
    (request,), tokens, seconds = make_requests(1), 0, 0.0
    for turn in range(2000):
        (most,) = length.choose([Candidate(request, MOST, 1000, 0)], 1)
        likelihoods: list[float] = []
        while len(likelihoods) < most and (
            not by_confidence or not likelihoods or length.goes_on(request, likelihoods, 1)
        ):
            likelihoods.append(0.97 if source.random() < 0.7 else 0.3)
        right = 0
        while right < len(likelihoods) and source.random() < likelihoods[right]:
            right += 1
        taken = step(1 + len(likelihoods))
        length.observe_step(1 + len(likelihoods), taken)
        if likelihoods:
            length.observe(request, len(likelihoods), right, likelihoods if by_confidence else ())
        if turn >= 500:
            tokens, seconds = tokens + 1 + right, seconds + taken + len(likelihoods) * drafter(1)
    return tokens / seconds * step(1)


def test_a_drafter_that_stops_where_it_doubts_gains_more() -> None:
    stopping, blind = (speedup_of_a_drafter_with_doubts(each) for each in (True, False))
    assert stopping > 1.05 * blind > 1.05
