"""The engine in a process of its own, so that HTTP never waits for the model nor the model for HTTP.

Started as `python -m llmopt.serve.engine_process FD`, where FD is the inherited end of a socket pair.
"""

import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmopt import quiet_barriers
from llmopt.errors import InputError, LlmoptError
from llmopt.serve.log import configure_logging
from llmopt.serve.protocol import Abort, Add, Configure, Deltas, EngineSocket, Failed, Ready, Rejected, ToEngine, frame

if TYPE_CHECKING:  # the API process imports this file to start the engine, and must stay without torch
    from llmopt.engine.engine import Engine

logger = logging.getLogger(__name__)

EXIT_SECONDS = 1.0


@contextmanager
def engine_process(configure: Configure) -> Iterator[tuple[subprocess.Popen, socket.socket]]:
    """A running engine process and the connection to it; afterwards it has ended.

    It has its own process group, so that Ctrl-C in a terminal reaches only the API process, which then lets running
    requests finish. It ends when the connection closes, so it never outlives the API process, however that ended.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmopt.serve.engine_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
        theirs.close()
        try:
            ours.sendall(frame(configure))
            yield process, ours
        finally:
            ours.close()
            try:
                process.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:  # it is in a long step or still loading, and has nothing to save
                process.kill()
                process.wait()


def main() -> None:
    quiet_barriers()
    for number in (signal.SIGINT, signal.SIGTERM):  # service managers signal every process; the API process decides
        signal.signal(number, signal.SIG_IGN)
    connection = EngineSocket(socket.socket(fileno=int(sys.argv[1])))
    try:
        _run(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the API process is gone, and with it the reason to be here


def _run(connection: EngineSocket) -> None:
    try:
        first, *others = connection.receive(None)
        if not isinstance(first, Configure):
            raise LlmoptError("the engine process must be configured before anything else")
        engine = _load(first)
        connection.send(
            Ready(
                max_model_len=engine.max_model_len,
                vocab_size=engine.model_config.vocab_size,
                blocks=engine.stats().total_blocks,
                block_size=engine.config.block_size,
                scheduling_policy=engine.config.scheduling_policy,
                default_sampling=engine.default_sampling,
            )
        )
        serve_requests(engine, connection, others)
    except LlmoptError as error:
        connection.send(Failed(str(error), error.exit_status))
    except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError for all that goes wrong in a kernel
        logger.debug("the engine failed", exc_info=True)
        reason = str(error).strip() or type(error).__name__
        connection.send(Failed(f"the engine failed: {reason.splitlines()[0]}", LlmoptError.exit_status))


def _load(configure: Configure) -> "Engine":
    from llmopt.engine.engine import Engine
    from llmopt.engine.resident import keep_resident

    configure_logging(configure.log_level)
    engine = Engine(configure.engine)
    keep_resident()
    return engine


def serve_requests(engine: "Engine", connection: EngineSocket, messages: list[ToEngine]) -> None:
    """The engine's loop: take in what has come, compute a step, give out what it added.

    Sleeps on the socket when there is nothing to compute, or nothing yet. Only ends by an exception: EOFError or
    OSError when the API process is gone.
    """
    while True:
        for message in messages:
            _take(engine, connection, message)
        connection.send(Deltas(engine.step() if engine.has_work else [], engine.stats()))
        messages = connection.receive(engine.pause if engine.has_work else None)


def _take(engine: "Engine", connection: EngineSocket, message: ToEngine) -> None:
    if isinstance(message, Abort):
        engine.abort(message.request_id)
    elif isinstance(message, Add):
        try:
            engine.add(message.request_id, message.prompt, message.params, message.priority, message.cache_salt)
        except InputError as error:
            connection.send(Rejected(message.request_id, str(error)))
    else:
        raise LlmoptError("the engine process was configured twice")


if __name__ == "__main__":
    main()
