"""One streamed completion: sends it, and writes down when its tokens arrive."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import msgspec
from aiohttp.http_exceptions import HttpProcessingError  # a line too long, for one, is no ClientError

from llmopt.bench.datasets import Prompt
from llmopt.bench.metrics import Chunk, RequestTrace, share_out
from llmopt.errors import InputError

_PREFIX = b"data:"
_DONE = b"[DONE]"
_LINE_BUFFER = 1 << 20  # bytes of one event; aiohttp's own 64 KiB is less than some servers send at the end


@dataclass(frozen=True)
class Target:
    """A server and how it is asked.

    Attributes:
        base_url: with or without the final /v1.
        model: the name the server knows the model by.
        api_key: sent as a bearer token.
        ignore_eos: ask for exactly `max_tokens` tokens, an extension that vLLM, llama.cpp and llmopt understand.
        counts_each_chunk: ask for the usage so far in every chunk, where the server can (vLLM's extension).
        timeout: seconds that a request may take in all.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    ignore_eos: bool = True
    counts_each_chunk: bool = True
    timeout: float = 600.0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # brackets or a port that are none
            usable = False
        if not usable:
            raise InputError(f"--base-url must be like http://127.0.0.1:8000, not {self.base_url!r}")
        if parts.username or parts.password:
            raise InputError("--base-url must not hold a password, for reports show it; give --api-key")
        if not self.timeout > 0:
            raise InputError(f"--timeout must be above 0 seconds, not {self.timeout}")

    @property
    def completions_url(self) -> str:
        return self.base_url.rstrip("/").removesuffix("/v1") + "/v1/completions"

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The JSON of a greedy, streamed request."""
        stream_options = {"include_usage": True}
        if self.counts_each_chunk:
            stream_options["continuous_usage_stats"] = True
        body = {
            "model": self.model,
            "prompt": prompt.content,
            "max_tokens": prompt.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": stream_options,
        }
        return body | {"ignore_eos": True} if self.ignore_eos else body


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class StreamError(Exception):
    """Why a request failed, in a few words that other requests' failures share."""


_decode_event = msgspec.json.Decoder(_Event).decode


def open_session(target: Target) -> aiohttp.ClientSession:
    """A client without a limit on connections, so that it is the server that limits."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=target.timeout),
        headers=target.headers,
        read_bufsize=_LINE_BUFFER,
    )


async def complete(session: aiohttp.ClientSession, target: Target, prompt: Prompt, trace: RequestTrace) -> None:
    """Send a prompt and fill in its trace; a failure goes into `trace.error` and is never raised."""
    reader = _Reader(trace)
    if not isinstance(prompt.content, str):
        trace.prompt_tokens = len(prompt.content)
    body = target.body(prompt)
    trace.sent = time.perf_counter()
    try:
        # A redirect is a failure: it would take the key elsewhere, and its time into the measurement.
        async with session.post(target.completions_url, json=body, allow_redirects=False) as response:
            if response.status != 200:
                raise StreamError(f"HTTP {response.status}: {_one_line(await response.text(errors='replace'))}")
            async for data in _server_sent_events(response):
                reader.take(data)
        reader.close()
    except StreamError as error:
        trace.error = str(error)
    except TimeoutError:
        trace.error = f"no answer within {target.timeout:g} s"
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        trace.error = f"the stream is not the JSON of completions: {error}"
    except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
        trace.error = f"{type(error).__name__}: {_one_line(str(error))}"
    trace.finished = time.perf_counter()


async def _server_sent_events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each event. Completions have one line of data an event."""
    async for line in response.content:
        if line.startswith(_PREFIX):
            yield line.removeprefix(_PREFIX).strip()


class _Arrival(NamedTuple):
    time: float
    has_text: bool
    tokens_so_far: int | None


class _Reader:
    """Turns a stream's events into the chunks of a trace."""

    def __init__(self, trace: RequestTrace) -> None:
        self.trace = trace
        self.arrivals: list[_Arrival] = []
        self.usage: _Usage | None = None
        self.ended = False

    def take(self, data: bytes) -> None:
        """Note one event. Raises StreamError where it reports an error."""
        now = time.perf_counter()
        if data == _DONE:
            self.ended = True
            return
        event = _decode_event(data)
        if event.error is not None:
            message = event.error.get("message") if isinstance(event.error, dict) else None
            raise StreamError(f"error in the stream: {_one_line(str(message or event.error))}")
        self.usage = event.usage or self.usage
        so_far = None if event.usage is None else event.usage.completion_tokens
        for choice in event.choices:
            self.ended |= choice.finish_reason is not None
            self.arrivals.append(_Arrival(now, bool(choice.text), so_far))

    def close(self) -> None:
        """Settle which chunk brought how many tokens. Raises StreamError for a stream that was cut off."""
        if not self.ended:
            raise StreamError("the stream ended before the completion did")
        texts = [arrival.time for arrival in self.arrivals if arrival.has_text]
        trace = self.trace
        trace.output_tokens = len(texts)
        if self.usage is not None:
            trace.prompt_tokens = self.usage.prompt_tokens
            trace.output_tokens = self.usage.completion_tokens
        if self.arrivals and all(arrival.tokens_so_far is not None for arrival in self.arrivals):
            trace.counting = "each chunk"
            trace.chunks = self._counted_chunks()
        else:
            trace.counting = "one a chunk" if self.usage is None else "shared out"
            shares = share_out(trace.output_tokens, len(texts))
            trace.chunks = [Chunk(*chunk) for chunk in zip(texts, shares, strict=True) if chunk[1]]

    def _counted_chunks(self) -> list[Chunk]:
        """A chunk wherever the count grew; text without a new token, as when a character becomes whole, is none."""
        chunks, counted = [], 0
        for arrival in self.arrivals:
            if arrival.tokens_so_far is not None and arrival.tokens_so_far > counted:
                chunks.append(Chunk(arrival.time, arrival.tokens_so_far - counted))
                counted = arrival.tokens_so_far
        return chunks


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
