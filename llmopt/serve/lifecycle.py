"""From the first socket to the last: start the engine, serve, drain, stop."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn
import uvloop

from llmopt.errors import InputError, LlmoptError
from llmopt.model.locate import locate
from llmopt.model.tokenizer import Tokenizer, load_tokenizer
from llmopt.serve.app import create_app
from llmopt.serve.call import ServedModel
from llmopt.serve.engine_client import EngineClient
from llmopt.serve.engine_process import engine_process
from llmopt.serve.errors import EngineStopped
from llmopt.serve.gate import Gate
from llmopt.serve.log import configure_logging
from llmopt.serve.metrics import Metrics
from llmopt.serve.protocol import Configure, Ready
from llmopt.serve.settings import ServerSettings

logger = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 2
"""How long clients get to take in the error that ends their requests."""
_BACKLOG = 2048


@dataclass(frozen=True)
class Started:
    """What there is to tell once the server answers; `seconds` is how long it took."""

    url: str
    model_names: tuple[str, ...]
    ready: Ready
    seconds: float


def run_server(settings: ServerSettings, announce: Callable[[Started], None]) -> int:
    """Serve until SIGINT or SIGTERM, then let running requests finish; calls `announce` once requests are answered.

    Returns 0 after an orderly end, 128 + the signal's number when a second signal cut it short. Raises InputError or
    LlmoptError where the server could not start, and LlmoptError where the engine failed under way.
    """
    configure_logging(settings.log_level)
    start = time.perf_counter()
    with _bound_socket(settings) as sock:
        # Found here, so that a wrong name is told at once and a hub model is fetched once, not by both processes.
        path = locate(settings.engine.model)
        configure = Configure(replace(settings.engine, model=str(path)), settings.log_level)
        with engine_process(configure) as (process, engine_socket):
            tokenizer = _load_tokenizer(path, settings.chat_template)  # while the engine loads its weights
            server = _Server(settings, sock, tokenizer, announce, start)
            try:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    return runner.run(server.run(engine_socket))
            except EngineStopped as error:
                raise LlmoptError(f"{error}{_how_it_ended(process)}") from None


class _Server:
    """One run of the server's event loop."""

    def __init__(
        self,
        settings: ServerSettings,
        sock: socket.socket,
        tokenizer: Tokenizer,
        announce: Callable[[Started], None],
        start: float,
    ) -> None:
        self.settings = settings
        self.socket = sock
        self.tokenizer = tokenizer
        self.announce = announce
        self.start = start
        self.signals: asyncio.Queue[int] = asyncio.Queue()

    async def run(self, engine_socket: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.signals.put_nowait, number)
        metrics = Metrics(self.settings.model_names[0])
        client = EngineClient(metrics)
        told = asyncio.create_task(self.signals.get())
        starting = asyncio.create_task(client.start(engine_socket))
        await asyncio.wait((told, starting), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            return 0
        model = ServedModel(self.tokenizer, self.settings.model_names, starting.result())
        gate = Gate(create_app(model, client, metrics), self.settings.api_key)
        return await self._serve(gate, client, model, told)

    async def _serve(self, gate: Gate, client: EngineClient, model: ServedModel, told: asyncio.Task[int]) -> int:
        server = _Uvicorn(
            uvicorn.Config(
                gate,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                http="httptools",
                timeout_graceful_shutdown=LAST_WORDS_SECONDS,
                backlog=_BACKLOG,
            )
        )
        with _port_errors(self.settings):
            self.socket.listen(_BACKLOG)  # from here on clients can connect
        serving = asyncio.create_task(server.serve(sockets=[self.socket]))
        self.announce(Started(_url(self.socket), model.names, model.ready, time.perf_counter() - self.start))
        try:
            await asyncio.wait((told, client.failure, serving), return_when=asyncio.FIRST_COMPLETED)
            return await self._end(gate, client)
        finally:
            client.close()  # what still runs ends with an error now
            server.should_exit = True
            await serving

    async def _end(self, gate: Gate, client: EngineClient) -> int:
        """Let open requests come to their end: their answers after a signal, their errors when the engine is gone."""
        idle = asyncio.create_task(gate.idle.wait())
        if not client.failure.done():
            gate.closing = True
            logger.info("stopping; open requests have %g s to finish", self.settings.shutdown_timeout)
            again = asyncio.create_task(self.signals.get())
            await asyncio.wait(
                (idle, again, client.failure),
                timeout=self.settings.shutdown_timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if again.done():
                return 128 + again.result()
        if client.failure.done():
            await asyncio.wait((idle,), timeout=LAST_WORDS_SECONDS)
            raise EngineStopped(str(client.failure.result()))
        return 0


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: it would close connections instead of draining them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bound_socket(settings: ServerSettings) -> socket.socket:
    """The server's socket, bound before the model is loaded, so that a port in use is told at once.

    It does not listen yet: clients are refused until there is somebody to answer them.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise InputError(f"the host {settings.host!r} is not known: {error.strerror}") from None
    sock = socket.socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        with _port_errors(settings):
            sock.bind(address)
    except LlmoptError:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _port_errors(settings: ServerSettings) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {settings.port} is in use; choose another with --port") from None
        raise InputError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"http://{host}:{port}"


def _load_tokenizer(path: Path, chat_template: str | None) -> Tokenizer:
    tokenizer = load_tokenizer(str(path))
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the chat template {chat_template}: {error}") from None
    return tokenizer


def _how_it_ended(process: subprocess.Popen) -> str:
    status = process.poll()
    if status is None:
        return ""
    return f" (killed by {signal.Signals(-status).name})" if status < 0 else f" (exit status {status})"
