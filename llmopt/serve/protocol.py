"""What the API process and the engine process say to each other.

Messages are msgspec structs as msgpack, each behind its length in four bytes, over a Unix socket pair. There is no
pickle: bytes that were tampered with can be refused but cannot run.
"""

import math
import select
import socket
import struct

import msgspec

from llmopt.engine.config import EngineConfig
from llmopt.engine.outputs import Delta, EngineStats
from llmopt.engine.params import SamplingParams

LENGTH = struct.Struct("<I")


class Configure(msgspec.Struct, frozen=True, tag=True):
    """The first message to a new engine process: what to load."""

    engine: EngineConfig
    log_level: str


class Add(msgspec.Struct, frozen=True, tag=True):
    """A prompt of tokens to complete; `priority` and `cache_salt` as in `Engine.add`."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for this request any more."""

    request_id: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded; `default_sampling` holds the sampling parameters that its makers advise."""

    max_model_len: int
    vocab_size: int
    blocks: int
    block_size: int
    scheduling_policy: str
    default_sampling: dict[str, int | float]


class Deltas(msgspec.Struct, frozen=True, tag=True):
    """What one turn of the loop added, and the engine's state after it."""

    deltas: list[Delta]
    stats: EngineStats


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot serve this request; the message is for whoever sent it."""

    request_id: str
    message: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The last message of an engine process that cannot go on."""

    message: str
    exit_status: int


ToEngine = Configure | Add | Abort
FromEngine = Ready | Deltas | Rejected | Failed

_encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    """A message as it goes over the socket."""
    payload = _encoder.encode(message)
    return LENGTH.pack(len(payload)) + payload


class EngineSocket:
    """The engine's end: plain blocking calls, because the engine's loop is a plain loop."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._received = bytearray()
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)

    def send(self, message: FromEngine) -> None:
        """Send a message. Raises OSError when the API process is gone."""
        self._socket.sendall(frame(message))

    def receive(self, seconds: float | None) -> list[ToEngine]:
        """The messages that have come, waiting for the first that long at most; None waits until there is one.

        Raises EOFError when the API process is gone.
        """
        messages = self._complete_messages()
        while seconds is None and not messages:
            self._read(0)
            messages = self._complete_messages()
        if seconds and not messages:
            self._readable.poll(math.ceil(1e3 * seconds))
        while self._read(socket.MSG_DONTWAIT):
            messages += self._complete_messages()
        return messages

    def _read(self, flags: int) -> bool:
        try:
            received = self._socket.recv(1 << 20, flags)
        except BlockingIOError:
            return False
        if not received:
            raise EOFError("the API process has closed the connection")
        self._received += received
        return True

    def _complete_messages(self) -> list[ToEngine]:
        messages, position = [], 0
        while len(self._received) - position >= LENGTH.size:
            start = position + LENGTH.size
            end = start + LENGTH.unpack_from(self._received, position)[0]
            if len(self._received) < end:
                break
            messages.append(to_engine_decoder.decode(memoryview(self._received)[start:end]))
            position = end
        del self._received[:position]
        return messages
