"""A server as its users start it, and an engine client with scripted answers."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models, pre_tokenizers

from llmopt.engine.outputs import Delta, TokenLogprobs
from llmopt.engine.params import SamplingParams
from llmopt.errors import LlmoptError
from llmopt.model.tokenizer import Tokenizer
from llmopt.serve.call import ServedModel
from llmopt.serve.errors import Unavailable
from llmopt.serve.protocol import Ready


class RunningServer:
    """`llmopt serve` in a process of its own; `log` holds the lines of its standard error so far."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "llmopt.cli.main", "serve", *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "NO_COLOR": "1", **environment},
        )
        self.log: list[str] = []
        self._address: str | None = None
        self._changed = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)
            found = re.search(r"^ready in .* at (http://\S+)$", line)
            if found:
                self._address = found.group(1)
                self._changed.set()
        self._changed.set()

    @property
    def url(self) -> str:
        """The server's address; waits until it is ready."""
        assert self._changed.wait(60), "not ready within 60 s:\n" + "".join(self.log)
        assert self._address, "ended before it was ready:\n" + "".join(self.log)
        return self._address

    def wait(self, seconds: float = 30) -> int:
        """The exit status, once it has ended."""
        status = self.process.wait(seconds)
        self._reader.join(5)
        return status

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self._reader.join(5)
        self.process.stderr.close()


@contextmanager
def _running_server(*arguments: str, **environment: str) -> Iterator[RunningServer]:
    server = RunningServer(arguments, environment)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def running_server() -> Callable[..., object]:
    """running_server(*arguments, **environment) is a context with a RunningServer, which has ended afterwards."""
    return _running_server


def byte_tokenizer() -> Tokenizer:
    """One token for each byte (its id is its place in GPT-2's alphabet) and <end>, 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encoder = Encoder(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens(["<end>"])
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}{{ mood }}"
    )
    return Tokenizer(encoder, eos_ids=[256], bos_id=None, pad_id=None, chat_template=template)


@pytest.fixture
def served_model() -> ServedModel:
    ready = Ready(
        max_model_len=100,
        vocab_size=257,
        blocks=10,
        block_size=16,
        scheduling_policy="fcfs",
        default_sampling={},
    )
    return ServedModel(byte_tokenizer(), ("small", "alias"), ready)


class ScriptedClient:
    """Stands in for EngineClient: answers every prompt with `text`, a token a character.

    Attributes:
        seen: the works of each call.
        placed: the priority and the salt of each call.
        closed: how many calls were closed before they had ended.
        error: ends every call, after its text.
        hang: never answers.
        down: why the engine is gone.
    """

    def __init__(self, tokenizer: Tokenizer, text: str = "hello") -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.error: LlmoptError | None = None
        self.hang = False
        self.seen: list[list[tuple[list[int], SamplingParams]]] = []
        self.placed: list[tuple[int, str | None]] = []
        self.closed = 0
        self.down: str | None = None

    def check_available(self, count: int) -> None:
        if self.down is not None:
            raise Unavailable(self.down)

    async def generate(self, request_id, works, priority=0, cache_salt=None) -> AsyncGenerator[tuple[int, Delta], None]:
        self.seen.append(list(works))
        self.placed.append((priority, cache_salt))
        ended = False
        try:
            if self.hang:
                await asyncio.sleep(3600)
            for position, character in enumerate(self.text):
                for index, (prompt, params) in enumerate(works):
                    yield index, self._delta(position, character, prompt, params)
            if self.error is not None:
                raise self.error
            ended = True
        finally:
            self.closed += not ended

    def _delta(self, position: int, character: str, prompt: list[int], params: SamplingParams) -> Delta:
        (token,) = self.tokenizer.encode(character)
        top = [(256, -0.25), (token, -1.5)][: params.logprobs or 0]
        return Delta(
            request_id="",
            text=character,
            token_ids=[token],
            logprobs=None if params.logprobs is None else [TokenLogprobs(token, -1.5, 2, top)],
            finish_reason="length" if position == len(self.text) - 1 and self.error is None else None,
            stop_reason=None,
            prompt_tokens=len(prompt),
            output_tokens=position + 1,
        )


@pytest.fixture
def scripted_client(served_model: ServedModel) -> ScriptedClient:
    return ScriptedClient(served_model.tokenizer)


@pytest.fixture(scope="session")
def eventually() -> Callable[[Callable[[], bool], float], None]:
    """eventually(condition, seconds) waits until the condition holds, and fails when it does not in time."""

    def wait(condition: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to that in time"
            time.sleep(0.05)

    return wait
