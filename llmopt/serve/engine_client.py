"""The API process's side of the engine: requests out, deltas in, nothing that blocks the event loop."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from llmopt.engine.outputs import Delta
from llmopt.engine.params import SamplingParams
from llmopt.errors import InputError, LlmoptError
from llmopt.serve.errors import EngineStopped, Unavailable
from llmopt.serve.metrics import Metrics, RequestTimer
from llmopt.serve.protocol import (
    LENGTH,
    Abort,
    Add,
    Deltas,
    Failed,
    FromEngine,
    Ready,
    Rejected,
    ToEngine,
    frame,
    from_engine_decoder,
)

MAX_OPEN = 16384
"""Engine requests open at once; more are refused, so that a flood does not fill the memory."""


class EngineClient:
    """Asks the engine process for completions.

    Attributes:
        failure: set with the reason once the engine is gone.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.failure: asyncio.Future[LlmoptError] = asyncio.get_running_loop().create_future()
        self._metrics = metrics
        self._open: dict[str, _OpenRequest] = {}

    async def start(self, sock: socket.socket) -> Ready:
        """Wait until the engine has loaded its model. Raises the engine's own error where it cannot."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=sock)
        try:
            ready = await self._receive()
        except (EOFError, OSError):
            raise EngineStopped("the engine process ended while it loaded the model") from None
        if isinstance(ready, Failed):
            raise _error_of(ready)
        if not isinstance(ready, Ready):
            raise LlmoptError(f"the engine process began with {type(ready).__name__} instead of Ready")
        self._listener = asyncio.create_task(self._listen())
        self._listener.add_done_callback(self._listener_ended)
        return ready

    def check_available(self, count: int) -> None:
        """Raise Unavailable unless the engine would take `count` more requests."""
        if self.failure.done():
            raise Unavailable(str(self.failure.result()))
        if len(self._open) + count > MAX_OPEN:
            raise Unavailable(f"the server is full: {len(self._open)} of at most {MAX_OPEN} requests are open")

    async def generate(
        self,
        request_id: str,
        works: Sequence[tuple[list[int], SamplingParams]],
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """Complete several prompts side by side; yields (index in `works`, delta) as they come, until all have ended.

        Closing the generator aborts what has not ended. A reader that is slow gets larger deltas and holds up nobody.
        Raises InputError where the engine refuses a prompt, Unavailable or EngineStopped where it is gone.
        """
        self.check_available(len(works))
        mailbox = _Mailbox()
        ids = [f"{request_id}-{index}" for index in range(len(works))]
        try:
            for index, (prompt, params) in enumerate(works):
                self._open[ids[index]] = _OpenRequest(index, mailbox, RequestTimer(self._metrics))
                self._send(Add(ids[index], prompt, params, priority, cache_salt))
            unfinished = len(works)
            while unfinished:
                for index, delta in await mailbox.take():
                    unfinished -= delta.finish_reason is not None
                    yield index, delta
        finally:
            for engine_id in ids:
                if self._open.pop(engine_id, None) is not None and not self.failure.done():
                    self._send(Abort(engine_id))
                    self._metrics.finished("abort")

    def close(self) -> None:
        """End the engine process by closing the connection, and every open request with an error."""
        self._fail(EngineStopped("the server has shut down"))
        self._listener.cancel()
        self._writer.close()

    def _send(self, message: ToEngine) -> None:
        self._writer.write(frame(message))

    async def _receive(self) -> FromEngine:
        (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        return from_engine_decoder.decode(await self._reader.readexactly(length))

    async def _listen(self) -> None:
        try:
            while True:
                message = await self._receive()
                if isinstance(message, Deltas):
                    self._take(message)
                elif isinstance(message, Rejected):
                    self._end(message.request_id, InputError(message.message))
                elif isinstance(message, Failed):
                    self._fail(_error_of(message))
                    return
        except (EOFError, OSError):
            self._fail(EngineStopped("the engine process has ended unexpectedly"))

    def _listener_ended(self, listener: asyncio.Task[None]) -> None:
        # Whatever else goes wrong in listening must not leave requests waiting for ever behind a healthy face.
        error = None if listener.cancelled() else listener.exception()
        if error is not None:
            self._fail(EngineStopped(f"the engine's messages could not be taken in: {error}"))

    def _take(self, message: Deltas) -> None:
        self._metrics.update(message.stats)
        for delta in message.deltas:
            request = self._open.get(delta.request_id)
            if request is None:  # aborted while the engine's step was under way
                continue
            request.timer.observe(delta)
            if delta.finish_reason is not None:
                del self._open[delta.request_id]
            request.mailbox.put(request.index, delta)

    def _end(self, request_id: str, error: LlmoptError) -> None:
        request = self._open.pop(request_id, None)
        if request is not None:
            request.mailbox.fail(error)

    def _fail(self, error: LlmoptError) -> None:
        if not self.failure.done():
            self.failure.set_result(error)
        for request_id in list(self._open):
            self._end(request_id, EngineStopped(str(error)))


def merge(deltas: Sequence[Delta]) -> Delta:
    """One delta that says what these deltas of one request say in turn."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    logprobs = None if last.logprobs is None else [entry for delta in deltas for entry in delta.logprobs or ()]
    of_prompt = (delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None)
    return Delta(
        request_id=last.request_id,
        text="".join(delta.text for delta in deltas),
        token_ids=[token for delta in deltas for token in delta.token_ids],
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_tokens=last.prompt_tokens,
        output_tokens=last.output_tokens,
        prompt_logprobs=next(of_prompt, None),
        cached_tokens=last.cached_tokens,
    )


class _Mailbox:
    """What a reader has not read yet; it never makes the sender wait."""

    def __init__(self) -> None:
        self._deltas: dict[int, list[Delta]] = {}
        self._error: LlmoptError | None = None
        self._changed = asyncio.Event()

    def put(self, index: int, delta: Delta) -> None:
        self._deltas.setdefault(index, []).append(delta)
        self._changed.set()

    def fail(self, error: LlmoptError) -> None:
        self._error = error
        self._changed.set()

    async def take(self) -> list[tuple[int, Delta]]:
        """All there is, one delta for each index; waits until there is something. Raises what `fail` was given."""
        await self._changed.wait()
        self._changed.clear()
        if self._error is not None:
            raise self._error
        deltas, self._deltas = self._deltas, {}
        return [(index, merge(each)) for index, each in deltas.items()]


@dataclass(frozen=True)
class _OpenRequest:
    index: int
    mailbox: _Mailbox
    timer: RequestTimer


def _error_of(failed: Failed) -> LlmoptError:
    return InputError(failed.message) if failed.exit_status == InputError.exit_status else LlmoptError(failed.message)
