"""Answers: whole or as server-sent events, in both cases only for as long as somebody listens."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Send

from llmopt.engine.outputs import Delta
from llmopt.errors import LlmoptError
from llmopt.serve.call import Call
from llmopt.serve.engine_client import EngineClient, merge
from llmopt.serve.errors import error_body, status_of

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

CLIENT_GONE = 499  # nginx's status for it; nobody reads it


class EventStream(StreamingResponse):
    """Server-sent events from a generator that is closed at once when the client goes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            await super().stream_response(send)


async def answer(http: Request, call: Call, client: EngineClient) -> Response:
    """Answer a call the way it asked for. Raises LlmoptError before anything was sent."""
    client.check_available(len(call.works))
    if call.request.stream:
        return EventStream(events(call, client))
    body = await unless_gone(http, collect(call, client))
    if body is None:
        return Response(status_code=CLIENT_GONE)
    return Response(msgspec.json.encode(body), media_type="application/json")


async def collect(call: Call, client: EngineClient) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    received: list[list[Delta]] = [[] for _ in call.works]
    async for index, delta in _logged(call, client):
        received[index].append(delta)
    return call.answer([merge(deltas) for deltas in received])


async def events(call: Call, client: EngineClient) -> AsyncGenerator[bytes, None]:
    """The events of a streamed answer. An error is the last event but one: the status was sent long ago."""
    try:
        async with aclosing(_logged(call, client)) as deltas:
            async for index, delta in deltas:
                for chunk in call.chunks(index, delta):
                    yield event(chunk)
        usage = call.usage_chunk()
        if usage is not None:
            yield event(usage)
    except LlmoptError as error:
        yield event(error_body(status_of(error), str(error)))
    yield b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


async def unless_gone(http: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`, or None if the client goes first; then `work` is cancelled."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _logged(call: Call, client: EngineClient) -> AsyncGenerator[tuple[int, Delta], None]:
    """The engine's deltas; says in the log how the request ended."""
    start, outcome = time.perf_counter(), "aborted"
    tokens = [0] * len(call.works)
    try:
        priority, salt = call.request.priority or 0, call.request.cache_salt
        async with aclosing(client.generate(call.id, call.works, priority, salt)) as deltas:
            async for index, delta in deltas:
                tokens[index] = delta.output_tokens
                yield index, delta
        outcome = "finished"
    except LlmoptError as error:
        outcome = f"failed: {error}"
        raise
    finally:
        prompt, seconds = sum(map(len, call.prompts)), time.perf_counter() - start
        logger.info("%s %s: %d + %d tokens in %.2f s", call.id, outcome, prompt, sum(tokens), seconds)
