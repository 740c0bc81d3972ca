"""The engine's loop against a scripted engine: no model, no process."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest

from llmopt.engine.outputs import Delta, EngineStats
from llmopt.engine.params import SamplingParams
from llmopt.errors import InputError, LlmoptError
from llmopt.serve.engine_process import serve_requests
from llmopt.serve.protocol import LENGTH, Abort, Add, Deltas, EngineSocket, Rejected, frame, from_engine_decoder


class CountingEngine:
    """Gives every request one token a step, three in all."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.steps = 0
        self.opens = 0.0  # until then, every step computes nothing

    @property
    def pause(self):
        return max(0.0, self.opens - time.monotonic())

    def add(self, request_id, prompt, params, priority, cache_salt):
        if not prompt:
            raise InputError("the prompt is empty")
        self.left[request_id] = 3

    def abort(self, request_id):
        self.left.pop(request_id, None)

    @property
    def has_work(self):
        return bool(self.left)

    def step(self):
        self.steps += 1
        deltas = []
        if self.pause:
            return deltas
        for request_id in list(self.left):
            self.left[request_id] -= 1
            reason = None if self.left[request_id] else "length"
            deltas.append(Delta(request_id, "x", [1], None, reason, None, 1, 3 - self.left[request_id]))
            if reason:
                del self.left[request_id]
        return deltas

    def stats(self):
        return EngineStats(
            running=len(self.left),
            waiting=0,
            total_blocks=8,
            used_blocks=0,
            cached_blocks=0,
            preemptions=0,
            prefix_cache_queries=0,
            prefix_cache_hits=0,
            prompt_tokens=0,
            generation_tokens=0,
            steps=self.steps,
        )


@pytest.fixture
def loop():
    """An engine's loop in a thread; it must end by EOFError once our end is closed."""
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    engine, ends = CountingEngine(), []

    def run():
        try:
            serve_requests(engine, EngineSocket(theirs), [])
        except (EOFError, LlmoptError) as error:
            ends.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()

    def receive():
        (length,) = LENGTH.unpack(ours.recv(LENGTH.size, socket.MSG_WAITALL))
        return from_engine_decoder.decode(ours.recv(length, socket.MSG_WAITALL))

    yield SimpleNamespace(engine=engine, send=lambda message: ours.sendall(frame(message)), receive=receive)
    ours.close()
    thread.join(10)
    theirs.close()
    assert ends == [EOFError]


def until_finished(loop, request_ids):
    tokens = dict.fromkeys(request_ids, 0)
    waiting = set(request_ids)
    while waiting:
        message = loop.receive()
        for delta in message.deltas:
            tokens[delta.request_id] += 1
            if delta.finish_reason:
                waiting.discard(delta.request_id)
    return tokens


def test_requests_are_served_side_by_side(loop):
    loop.send(Add("a", [1], SamplingParams()))
    loop.send(Add("b", [1], SamplingParams()))
    assert until_finished(loop, ["a", "b"]) == {"a": 3, "b": 3}


def test_a_request_that_cannot_be_served_is_told_so_and_the_loop_goes_on(loop):
    loop.send(Add("bad", [], SamplingParams()))
    messages = [loop.receive(), loop.receive()]
    assert Rejected("bad", "the prompt is empty") in messages
    loop.send(Add("good", [1], SamplingParams()))
    assert until_finished(loop, ["good"]) == {"good": 3}


def test_an_abort_is_answered_with_the_new_state(loop):
    assert loop.receive().stats.running == 0  # the first state, before anything came
    loop.send(Abort("never seen"))
    assert loop.receive() == Deltas([], loop.engine.stats())


def test_an_idle_loop_sleeps(loop):
    loop.send(Add("a", [1], SamplingParams()))
    until_finished(loop, ["a"])
    steps = loop.engine.steps
    loop.send(Abort("a"))
    loop.receive()
    assert loop.engine.steps == steps == 3


def test_a_loop_that_gathers_a_batch_sleeps_and_wakes_by_itself(loop):
    loop.engine.opens = time.monotonic() + 0.3
    loop.send(Add("a", [1], SamplingParams()))
    assert until_finished(loop, ["a"]) == {"a": 3}
    assert time.monotonic() >= loop.engine.opens
    assert loop.engine.steps <= 3 + 3, "one step that found nothing, or a few, but no busy loop"


def test_a_loop_that_gathers_a_batch_takes_in_what_comes(loop):
    loop.engine.opens = time.monotonic() + 60
    loop.send(Add("a", [1], SamplingParams()))
    while not loop.receive().stats.running:
        pass
    loop.send(Abort("a"))
    assert loop.receive().stats.running == 0
