"""The servers that are compared: how each is started so that it shows its best, and how it is stopped for certain.

A server runs only while it is measured, on a free port of the loopback address. None keeps prompts in a cache, for
all are random; each takes as many requests at once as the case sends, and computes all their prompts in one step.
"""

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
from bench_artifacts import LLMOPT, WORK, flags
from bench_clients import CLIENTS, SERVED, warm_up
from bench_engines import THREADS, TIMEOUT, VLLM_ENVIRONMENT, VLLM_ONE_PROCESS, Ways
from bench_rows import Case, Speed
from environments import llama_tool, program

from llmopt.errors import LlmoptError

START_TIMEOUT = TIMEOUT  # until a server is healthy; vLLM compiles first
STOP_TIMEOUT = 30  # seconds that it has to end by itself
LOOPBACK = "127.0.0.1"
_POLL = 0.2
_LEFT = 5  # seconds that a server's other processes may outlive it
_SHOWN = 2000  # characters of the log of one that failed


@contextmanager
def running(command: Sequence[str], port: int, environment: Mapping[str, str], log: Path) -> Iterator[str]:
    """A server's address, from when GET /health answers 200 on it. At the end no process of it is left.

    Raises LlmoptError with the end of its log where it ends or is not healthy within START_TIMEOUT.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True
        )
    try:
        _wait_until_healthy(process, port, log)
        yield f"http://{LOOPBACK}:{port}"
    finally:
        _stop(process)


def _wait_until_healthy(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not _is_healthy(port):
        ended = process.poll() is not None
        if ended or time.monotonic() > deadline:
            why = f"ended with status {process.returncode}" if ended else f"was not ready within {START_TIMEOUT} s"
            words = log.read_text("utf-8", errors="replace")[-_SHOWN:]
            raise LlmoptError(f"{' '.join(process.args)} {why}; its last words: ...{words}")
        time.sleep(_POLL)


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen) -> None:
    """End a server and all that it started: first as its users do, then by force."""
    family = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT)
    with suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _, left = psutil.wait_procs(family, timeout=_LEFT)  # those in a group of their own
    for each in left:
        each.kill()
    psutil.wait_procs(left, timeout=_LEFT)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        return taken.getsockname()[1]


@dataclass(frozen=True)
class Way:
    """One way to run a server: what is added to its command and to its environment."""

    options: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


class Server:
    """A server as an engine: its speed is that of whole requests, as a client sees it.

    Where there are several ways to run it, its first turn runs all of them, and then it keeps to what was the fastest.
    """

    def __init__(self, name: str, command: Callable[[Case], Sequence[str]], ways: Mapping[str, Way]) -> None:
        """`command` gives all but the address and what the way adds; `ways` are by what the report calls them."""
        self.name = name
        self.command = command
        self.ways = ways
        self._choice = Ways(*ways)

    @property
    def settings(self) -> str:
        return f"{self.name}, {THREADS} threads, {self._choice}"

    def measure(self, case: Case) -> Speed:
        return self._choice.run(f"http-{case.batch}", partial(self._run, case))

    def _run(self, case: Case, way: str) -> Speed:
        port = free_port()
        address = {"--host": LOOPBACK, "--port": port}
        command = [*self.command(case), *flags(address | self.ways[way].options)]
        with running(command, port, self.ways[way].environment, WORK / f"{self.name.replace(' ', '-')}.log") as url:
            warm_up(url, case)
            return CLIENTS[case.client](url, case)

    def close(self) -> None:
        pass


def llmopt_serve(model: Path) -> Server:
    def command(case: Case) -> Sequence[str]:
        options = {
            "--served-model-name": SERVED,
            "--max-num-seqs": case.batch,
            "--max-num-batched-tokens": case.batch * case.prompt_len,
            "--max-model-len": room(case),
            "--threads": THREADS,
        }
        return [*LLMOPT, "serve", str(model), *flags(options)]

    return Server("llmopt serve", command, {"two processes": Way()})


def llama_server(model: Path) -> Server:
    def command(case: Case) -> Sequence[str]:
        options = {
            "-m": model,
            "-a": SERVED,
            "-np": case.batch,
            "-c": case.batch * room(case),
            "-t": THREADS,
            "--cache-ram": 0,
        }
        return [str(llama_tool("server")), *flags(options), "--no-cache-prompt"]

    return Server("llama-server", command, {f"-fa {flash}": Way({"-fa": flash}) for flash in ("off", "on")})


def vllm_serve(model: Path) -> Server:
    """vLLM's server in two ways: with the engine in one process, which computes with all cores, and as it comes, where
    a worker process computes and one core is kept for the process that schedules. A worker bound to all cores is no
    third way: what schedules spins beside it."""

    def command(case: Case) -> Sequence[str]:
        options = {
            "--served-model-name": SERVED,
            "--dtype": "bfloat16",
            "--max-num-seqs": case.batch,
            "--max-num-batched-tokens": case.batch * case.prompt_len,
            "--max-model-len": room(case),
        }
        switches = ("--no-enable-prefix-caching", "--disable-uvicorn-access-log")
        return [str(program("vllm", "vllm")), "serve", str(model), *flags(options), *switches]

    ways = {
        "engine in one process": Way(environment=VLLM_ENVIRONMENT | VLLM_ONE_PROCESS),
        "a core for scheduling": Way(environment=VLLM_ENVIRONMENT),
    }
    return Server("vllm serve", command, ways)


def room(case: Case) -> int:
    """Tokens that a request may come to: a text of random tokens can be encoded to a few more than it was made of."""
    return case.prompt_len + case.gen_len + 64
