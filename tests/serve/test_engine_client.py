"""The client against a scripted engine at the other end of the socket."""

import asyncio
import socket
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest

from llmopt.engine.outputs import Delta, EngineStats, TokenLogprobs
from llmopt.engine.params import SamplingParams
from llmopt.errors import InputError, LlmoptError
from llmopt.serve import engine_client
from llmopt.serve.engine_client import EngineClient, merge
from llmopt.serve.errors import EngineStopped, Unavailable
from llmopt.serve.metrics import Metrics
from llmopt.serve.protocol import LENGTH, Abort, Add, Deltas, Failed, Ready, Rejected, frame, to_engine_decoder

READY = Ready(
    max_model_len=8, vocab_size=9, blocks=4, block_size=2, scheduling_policy="fcfs", default_sampling={"top_k": 5}
)
WORK = ([1, 2], SamplingParams())


def delta(request_id, text, finish=None, output_tokens=1, logprobs=None):
    return Delta(request_id, text, [1], logprobs, finish, None, 2, output_tokens)


def stats(running=0, preemptions=0):
    return EngineStats(
        running=running,
        waiting=0,
        total_blocks=4,
        used_blocks=0,
        cached_blocks=0,
        preemptions=preemptions,
        prefix_cache_queries=10 * preemptions,
        prefix_cache_hits=3 * preemptions,
        prompt_tokens=0,
        generation_tokens=0,
        steps=0,
    )


class Peer:
    """The engine's end of the connection."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def send(self, message):
        self.writer.write(frame(message))

    def deltas(self, *deltas, running=0, preemptions=0):
        self.send(Deltas(list(deltas), stats(running, preemptions)))

    async def receive(self):
        async with asyncio.timeout(5):
            (length,) = LENGTH.unpack(await self.reader.readexactly(LENGTH.size))
            return to_engine_decoder.decode(await self.reader.readexactly(length))


@asynccontextmanager
async def connected(first=READY):
    ours, theirs = socket.socketpair()
    peer = Peer(*await asyncio.open_unix_connection(sock=theirs))
    metrics = Metrics("m")
    client = EngineClient(metrics)
    peer.send(first)
    client.ready = await client.start(ours)
    client.metrics = metrics
    try:
        yield client, peer
    finally:
        client.close()
        peer.writer.close()


def run(scenario):
    async def limited():
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(limited())


def test_deltas_reach_their_request_until_it_ends():
    async def scenario():
        async with connected() as (client, peer):
            assert client.ready == READY
            stream = client.generate("r", [WORK, WORK])
            first = asyncio.create_task(anext(stream))
            assert await peer.receive() == Add("r-0", *WORK)
            assert await peer.receive() == Add("r-1", *WORK)
            peer.deltas(delta("r-1", "b"), delta("r-0", "a"), running=2)
            got = [await first, await anext(stream)]
            peer.deltas(delta("r-0", "c", "stop"))
            peer.deltas(delta("r-1", "d", "length"))
            got += [item async for item in stream]
            assert [(index, each.text) for index, each in got] == [(1, "b"), (0, "a"), (0, "c"), (1, "d")]
            assert 'vllm:num_requests_running{engine="0",model_name="m"} 0.0' in client.metrics.render().decode()

    run(scenario)


def test_a_slow_reader_gets_larger_deltas_and_holds_up_nobody():
    async def scenario():
        async with connected() as (client, peer):
            slow, quick = client.generate("slow", [WORK]), client.generate("quick", [WORK])
            reading = asyncio.create_task(anext(slow)), asyncio.create_task(anext(quick))
            peer.deltas(delta("slow-0", "0"), delta("quick-0", "0"))
            await asyncio.gather(*reading)
            for step in range(1, 100):
                finish = "length" if step == 99 else None
                peer.deltas(*(delta(f"{name}-0", str(step), finish, step + 1) for name in ("slow", "quick")))
                if step % 10 == 0:
                    assert (await anext(quick))[1].text
            assert [each.finish_reason async for _, each in quick][-1] == "length"
            rest = [each async for _, each in slow]
            assert len(rest) == 1
            assert rest[0].text == "".join(map(str, range(1, 100)))
            assert (len(rest[0].token_ids), rest[0].output_tokens, rest[0].finish_reason) == (99, 100, "length")

    run(scenario)


def test_closing_aborts_what_has_not_ended_and_late_deltas_do_no_harm():
    async def scenario():
        async with connected() as (client, peer):
            async with aclosing(client.generate("r", [WORK, WORK])) as stream:
                reading = asyncio.create_task(anext(stream))
                await peer.receive()
                await peer.receive()
                peer.deltas(delta("r-0", "a", "stop"))
                await reading
            assert await peer.receive() == Abort("r-1")
            peer.deltas(delta("r-1", "too late"), running=1)
            peer.deltas(running=0)
            again = client.generate("s", [WORK])
            reading = asyncio.create_task(anext(again))
            await peer.receive()
            peer.deltas(delta("s-0", "b", "stop"))
            assert (await reading)[1].text == "b"
            text = client.metrics.render().decode()
            assert 'request_success_total{engine="0",finished_reason="abort",model_name="m"} 1.0' in text

    run(scenario)


def test_a_cancelled_reader_aborts():
    async def scenario():
        async with connected() as (client, peer):

            async def read():
                async for _ in client.generate("r", [WORK]):
                    pass

            reading = asyncio.create_task(read())
            await peer.receive()
            reading.cancel()
            assert await peer.receive() == Abort("r-0")

    run(scenario)


def test_a_rejected_prompt_is_the_callers_error_and_ends_its_siblings():
    async def scenario():
        async with connected() as (client, peer):
            reading = asyncio.create_task(anext(client.generate("r", [WORK, WORK])))
            await peer.receive()
            peer.send(Rejected("r-0", "no such token"))
            with pytest.raises(InputError, match="no such token"):
                await reading
            assert await peer.receive() == Add("r-1", *WORK)
            assert await peer.receive() == Abort("r-1")

    run(scenario)


@pytest.mark.parametrize(("last", "reason"), [(Failed("out of memory", 3), "out of memory"), (None, "unexpectedly")])
def test_when_the_engine_ends_every_open_request_is_told(last, reason):
    async def scenario():
        async with connected() as (client, peer):
            reading = asyncio.create_task(anext(client.generate("r", [WORK])))
            await peer.receive()
            client.check_available(1)
            if last is not None:
                peer.send(last)
            peer.writer.close()
            with pytest.raises(EngineStopped, match=reason):
                await reading
            assert reason in str(client.failure.result())
            with pytest.raises(Unavailable, match=reason):
                client.check_available(1)

    run(scenario)


def test_a_message_that_makes_no_sense_is_the_end_too():
    async def scenario():
        async with connected() as (client, peer):
            reading = asyncio.create_task(anext(client.generate("r", [WORK])))
            await peer.receive()
            peer.writer.write(LENGTH.pack(1) + b"\x00")
            with pytest.raises(EngineStopped, match="messages could not be taken in"):
                await reading
            with pytest.raises(Unavailable):
                client.check_available(0)

    run(scenario)


@pytest.mark.parametrize(("status", "kind"), [(2, InputError), (3, LlmoptError)])
def test_a_model_that_cannot_be_loaded_keeps_its_exit_status(status, kind):
    async def scenario():
        with pytest.raises(kind, match="there is no model") as caught:
            async with connected(Failed("there is no model", status)):
                pass
        assert caught.value.exit_status == status

    run(scenario)


def test_a_flood_is_refused(monkeypatch):
    monkeypatch.setattr(engine_client, "MAX_OPEN", 3)

    async def scenario():
        async with connected() as (client, peer):
            stream = client.generate("r", [WORK, WORK])
            reading = asyncio.create_task(anext(stream))
            await peer.receive()
            client.check_available(1)
            with pytest.raises(Unavailable, match="the server is full: 2 of at most 3"):
                client.check_available(2)
            reading.cancel()

    run(scenario)


def test_priority_and_salt_go_with_every_prompt():
    async def scenario():
        async with connected() as (client, peer):
            reading = asyncio.create_task(anext(client.generate("r", [WORK, WORK], priority=-2, cache_salt="s")))
            assert await peer.receive() == Add("r-0", *WORK, priority=-2, cache_salt="s")
            assert await peer.receive() == Add("r-1", *WORK, priority=-2, cache_salt="s")
            reading.cancel()

    run(scenario)


def test_the_engines_counts_are_taken_by_their_difference():
    async def scenario():
        async with connected() as (client, peer):
            for total in (2, 2, 5):
                stream = client.generate(f"r{total}", [WORK])
                reading = asyncio.create_task(anext(stream))
                await peer.receive()
                peer.deltas(delta(f"r{total}-0", "a", "stop"), preemptions=total)
                await reading
                await stream.aclose()
            text = client.metrics.render().decode()
            assert 'vllm:num_preemptions_total{engine="0",model_name="m"} 5.0' in text
            assert 'vllm:prefix_cache_queries_total{engine="0",model_name="m"} 50.0' in text
            assert 'vllm:prefix_cache_hits_total{engine="0",model_name="m"} 15.0' in text
            assert 'vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 3.0' in text
            assert 'vllm:prompt_tokens_total{engine="0",model_name="m"} 6.0' in text
            assert 'vllm:generation_tokens_total{engine="0",model_name="m"} 3.0' in text

    run(scenario)


def test_merge_keeps_every_tokens_logprobs():
    entries = [TokenLogprobs(i, -1.0, 1, []) for i in range(3)]
    last = replace(delta("r", "b", "stop", 3, entries[1:]), cached_tokens=1)
    merged = merge([delta("r", "a", logprobs=entries[:1]), last])
    assert (merged.text, merged.logprobs, merged.finish_reason, merged.output_tokens) == ("ab", entries, "stop", 3)
    assert merged.cached_tokens == 1


def test_merge_keeps_what_the_first_delta_says_of_the_prompt():
    first = replace(delta("r", "a"), prompt_logprobs=[None, TokenLogprobs(1, -1.0, 1, [])])
    assert merge([first, delta("r", "b")]).prompt_logprobs == first.prompt_logprobs
    assert merge([delta("r", "b"), delta("r", "c")]).prompt_logprobs is None
