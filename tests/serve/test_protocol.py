import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.engine.config import EngineConfig
from llmopt.engine.outputs import Delta, EngineStats, TokenLogprobs
from llmopt.engine.params import SamplingParams
from llmopt.serve.protocol import LENGTH, Abort, Add, Configure, Deltas, EngineSocket, frame, from_engine_decoder

MESSAGES = [
    Configure(EngineConfig(model="m", threads=2, kv_cache_memory_bytes=1 << 40), "info"),
    Add("a", list(range(300)), SamplingParams(stop=("x", "é"), seed=2**64 - 1, stop_token_ids=(3,), max_tokens=None)),
    Abort("a"),
    Add("b", [1], SamplingParams(logprobs=5, temperature=0)),
    Add("c", [1], SamplingParams(logit_bias={5: -1.5}, allowed_token_ids=(5, 6), bad_words=("é",), prompt_logprobs=0)),
]
STATS = EngineStats(
    running=1,
    waiting=2,
    total_blocks=3,
    used_blocks=2,
    cached_blocks=1,
    preemptions=5,
    prefix_cache_queries=9,
    prefix_cache_hits=4,
    prompt_tokens=6,
    generation_tokens=7,
    steps=8,
)


@given(st.lists(st.integers(1, 400), max_size=8))
def test_messages_survive_any_cut_of_the_stream(sizes):
    stream = b"".join(frame(message) for message in MESSAGES)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection, received = EngineSocket(theirs), []
        for size in sizes:
            ours.sendall(stream[:size])
            stream = stream[size:]
            received += connection.receive(0)
        ours.sendall(stream)
        while len(received) < len(MESSAGES):
            received += connection.receive(None)
    assert received == MESSAGES


def test_receive_without_wait_returns_at_once():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert EngineSocket(theirs).receive(0) == []


@pytest.mark.parametrize("wait", [True, False])
def test_a_closed_connection_is_the_end(wait):
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        with pytest.raises(EOFError):
            EngineSocket(theirs).receive(wait)


def test_a_message_goes_behind_its_length_and_comes_back_the_same():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        steps = [TokenLogprobs(1, float("-inf"), 1, [(1, -0.5)])]
        delta = Delta("a", "t", [1], steps, "stop", 7, 3, 1, prompt_logprobs=[None, *steps])
        EngineSocket(theirs).send(Deltas([delta], STATS))
        data = ours.recv(1 << 16)
    assert LENGTH.unpack(data[: LENGTH.size])[0] == len(data) - LENGTH.size
    assert from_engine_decoder.decode(data[LENGTH.size :]) == Deltas([delta], STATS)


def test_waiting_for_messages_ends_by_the_clock_and_by_a_message():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = EngineSocket(theirs)
        start = time.monotonic()
        assert connection.receive(0.05) == []
        assert 0.05 <= time.monotonic() - start < 5
        ours.sendall(frame(Abort("a")))
        assert connection.receive(60) == [Abort("a")]
        ours.close()
        with pytest.raises(EOFError):
            connection.receive(60)
