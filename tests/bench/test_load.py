"""The load generator against a small server on this machine that streams what each test wants."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from aiohttp import web

from llmopt.bench.datasets import Prompt
from llmopt.bench.load import run_load
from llmopt.bench.metrics import RequestTrace, itl_ms, ttft_ms
from llmopt.bench.stream import Target
from llmopt.errors import InputError, LlmoptError

Answer = Callable[[dict, web.StreamResponse], Awaitable[None]]


async def send(response: web.StreamResponse, event: dict | str) -> None:
    data = event if isinstance(event, str) else json.dumps(event)
    await response.write(f"data: {data}\n\n".encode())


def text(content: str, finish: str | None = None, usage: int | None = None) -> dict:
    event: dict = {"choices": [{"index": 0, "text": content, "finish_reason": finish}]}
    return event if usage is None else event | {"usage": usage_of(usage)}


def usage_of(tokens: int) -> dict:
    return {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}


async def whole(body: dict, response: web.StreamResponse) -> None:
    """Two tokens, each counted, as a server does that knows continuous usage."""
    await send(response, text("a", usage=1))
    await send(response, text("b", finish="length", usage=2))
    await send(response, {"choices": [], "usage": usage_of(2)})
    await send(response, "[DONE]")


class Server:
    """Answers with `answer`, and remembers what it was asked."""

    def __init__(self, answer: Answer = whole, refuses_continuous_usage: bool = False) -> None:
        self.answer = answer
        self.refuses = refuses_continuous_usage
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.running = self.most_running = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.refuses and "continuous_usage_stats" in body["stream_options"]:
            return web.json_response({"error": "unknown field"}, status=400)
        if body["prompt"] == "refuse":
            return web.Response(status=503, body=b"too \xff\nbusy")
        if body["prompt"] == "elsewhere":
            raise web.HTTPTemporaryRedirect("http://127.0.0.1:1/")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.answer(body, response)
        finally:
            self.running -= 1
        return response

    def load(
        self, prompts: list[str], due=None, max_concurrency=None, warmups: int = 1, **target
    ) -> list[RequestTrace]:
        """Run the load generator against this server."""
        seen: list[RequestTrace] = []

        async def run() -> list[RequestTrace]:
            app = web.Application()
            app.router.add_post("/v1/completions", self.handle)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            try:
                return await run_load(
                    Target(f"http://127.0.0.1:{port}", "m", **target),
                    [Prompt(prompt, 2) for prompt in prompts],
                    np.zeros(len(prompts)) if due is None else np.array(due),
                    max_concurrency,
                    [Prompt("warm-up", 2)] * warmups,
                    seen.append,
                )
            finally:
                await runner.cleanup()

        traces = asyncio.run(run())
        assert sorted(map(id, seen)) == sorted(map(id, traces))
        return traces


def test_a_whole_answer_is_counted_as_the_server_counts():
    server = Server()
    traces = server.load(["x"] * 5, api_key="secret")
    assert [(t.ok, t.prompt_tokens, t.output_tokens, t.counting) for t in traces] == [(True, 7, 2, "each chunk")] * 5
    assert all(t.scheduled <= t.sent < t.chunks[0].time <= t.chunks[1].time <= t.finished for t in traces)
    assert all(header["Authorization"] == "Bearer secret" for header in server.headers)
    assert server.bodies[0]["ignore_eos"] is True and server.bodies[0]["max_tokens"] == 2
    assert "secret" not in repr(Target("http://x", "m", api_key="secret"))


def test_ignore_eos_is_only_sent_where_asked_for():
    server = Server()
    server.load(["x"], ignore_eos=False)
    assert all("ignore_eos" not in body for body in server.bodies)


def test_warm_ups_are_not_measured():
    server = Server()
    assert len(server.load(["x"] * 3, warmups=2)) == 3
    assert [body["prompt"] for body in server.bodies] == ["warm-up"] * 2 + ["x"] * 3


def test_chunks_of_several_tokens_are_told_apart_by_continuous_usage():
    async def speculative(body: dict, response: web.StreamResponse) -> None:
        await send(response, text("a", usage=1))
        await asyncio.sleep(0.05)
        await send(response, text("bcde", usage=5))
        await send(response, text("", finish="length", usage=5))
        await send(response, "[DONE]")

    (trace,) = Server(speculative).load(["x"])
    assert [chunk.tokens for chunk in trace.chunks] == [1, 4]
    assert len(itl_ms(trace)) == 4 and sum(itl_ms(trace)) >= 50


def test_tokens_are_shared_out_where_only_the_end_counts_them():
    async def counts_at_the_end(body: dict, response: web.StreamResponse) -> None:
        for piece in ("ab", "cd", "ef"):
            await send(response, text(piece))
            await asyncio.sleep(0.01)
        await send(response, text("", finish="length", usage=6))
        await send(response, "[DONE]")

    (trace,) = Server(counts_at_the_end, refuses_continuous_usage=True).load(["x"])
    assert [chunk.tokens for chunk in trace.chunks] == [2, 2, 2]
    assert (trace.counting, trace.output_tokens, trace.prompt_tokens) == ("shared out", 6, 7)
    assert ttft_ms(trace)[0] < 1e3 * (trace.finished - trace.sent) - 15


def test_without_any_usage_a_chunk_is_a_token():
    async def silent(body: dict, response: web.StreamResponse) -> None:
        for piece in "abc":
            await send(response, text(piece))
        await send(response, text("", finish="stop"))

    (trace,) = Server(silent).load(["x"])
    assert (trace.ok, trace.output_tokens, trace.counting) == (True, 3, "one a chunk")


def test_a_server_that_refuses_continuous_usage_is_asked_without_it():
    server = Server(refuses_continuous_usage=True)
    assert all(trace.ok for trace in server.load(["x"] * 2))
    assert ["continuous_usage_stats" in body["stream_options"] for body in server.bodies] == [True, False, False, False]


def test_every_kind_of_failure_is_accounted_for():
    async def fails(body: dict, response: web.StreamResponse) -> None:
        if body["prompt"] in ("cut", "drop"):
            await send(response, text("a", usage=1))
            if body["prompt"] == "drop":
                response._req.transport.abort()
        elif body["prompt"] == "error":
            await send(response, {"error": {"message": "out of\nmemory"}})
        elif body["prompt"] == "garbage":
            await send(response, "{not json")
        elif body["prompt"] == "bytes":
            await response.write(b'data: {"choices": [{"text": "\xff"}]}\n\n')
        elif body["prompt"] == "long":
            await response.write(b"data: " + b"x" * (3 << 20))
        elif body["prompt"] == "hang":
            await asyncio.sleep(30)
        else:
            await whole(body, response)

    names = ["fine", "cut", "drop", "error", "garbage", "long", "hang", "refuse", "elsewhere", "bytes"]
    traces = dict(zip(names, Server(fails).load(names, timeout=2.0), strict=True))
    assert [name for name, trace in traces.items() if trace.ok] == ["fine"]
    assert traces["cut"].error == "the stream ended before the completion did"
    assert traces["error"].error == "error in the stream: out of memory"
    assert "JSON" in traces["garbage"].error
    assert traces["hang"].error == "no answer within 2 s"
    assert traces["refuse"].error == "HTTP 503: too � busy"
    assert traces["elsewhere"].error.startswith("HTTP 307")
    assert "JSON" in traces["bytes"].error
    assert all("\n" not in trace.error for name, trace in traces.items() if name != "fine")
    assert all(trace.finished > trace.sent for trace in traces.values())


def test_the_closed_loop_keeps_to_its_concurrency_and_is_due_when_a_slot_is_free():
    async def slow(body: dict, response: web.StreamResponse) -> None:
        await asyncio.sleep(0.05)
        await whole(body, response)

    server = Server(slow)
    traces = server.load(["x"] * 12, max_concurrency=3)
    assert server.most_running == 3
    assert all(trace.sent - trace.scheduled < 0.1 for trace in traces)


def test_without_a_limit_there_are_more_connections_than_a_client_has_by_default():
    arrived = asyncio.Event()
    server = Server()

    async def wait_for_all(body: dict, response: web.StreamResponse) -> None:
        if server.running == 120:
            arrived.set()
        if body["prompt"] != "warm-up":
            await arrived.wait()
        await whole(body, response)

    server.answer = wait_for_all
    assert all(trace.ok for trace in server.load(["x"] * 120, timeout=20.0))
    assert server.most_running == 120


def test_a_schedule_does_not_slip_behind_a_slow_server():
    async def slow(body: dict, response: web.StreamResponse) -> None:
        await asyncio.sleep(0.5)
        await whole(body, response)

    due = [0.0, 0.05, 0.1, 0.15]
    traces = Server(slow).load(["x"] * 4, due=due)
    assert np.diff([trace.scheduled for trace in traces]) == pytest.approx([0.05] * 3, abs=1e-6)
    assert all(-1e-3 < trace.sent - trace.scheduled < 0.4 for trace in traces)


def test_waiting_for_a_slot_counts_from_the_schedule():
    async def slow(body: dict, response: web.StreamResponse) -> None:
        await asyncio.sleep(0.1)
        await whole(body, response)

    last = Server(slow).load(["x"] * 3, due=[0.0, 0.001, 0.002], max_concurrency=1)[-1]
    assert last.sent - last.scheduled > 0.15


def test_a_server_that_is_not_there_is_an_error_at_once():
    begin = time.perf_counter()
    with pytest.raises(LlmoptError, match="does not answer the warm-up") as raised:
        asyncio.run(
            run_load(Target("http://127.0.0.1:1/v1", "m"), [Prompt("x", 1)], np.zeros(1), None, [Prompt("w", 1)], print)
        )
    assert raised.value.exit_status == 3
    assert time.perf_counter() - begin < 5


def test_the_base_url_may_end_in_v1():
    assert {Target(url, "m").completions_url for url in ("http://h:1", "http://h:1/", "http://h:1/v1/")} == {
        "http://h:1/v1/completions"
    }


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://h", "http://", "http://user:pass@h", "http://h:x", "http://h:99999", "http://[::1"]
)
def test_a_base_url_of_another_form_is_refused(url):
    with pytest.raises(InputError, match="--base-url"):
        Target(url, "m")
