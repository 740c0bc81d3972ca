"""What stands in front of every route: the key, the size of bodies, the count of open requests, the closing time."""

import asyncio
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmopt.serve.errors import ApiError, error_response

MAX_BODY_BYTES = 32 * 1024 * 1024
_TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES >> 20} MiB"


class Gate:
    """An ASGI application around another.

    Attributes:
        closing: set once the server is told to stop; new requests then get 503.
        idle: set while no request is open.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._open = 0
        self.closing = False
        self.idle = asyncio.Event()
        self.idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        if refusal is not None:
            status, message, code = refusal
            await error_response(status, message, code=code)(scope, receive, send)
            return
        self._open += 1
        self.idle.clear()
        try:
            await self._app(scope, _limited(receive), send)
        finally:
            self._open -= 1
            if self._open == 0:
                self.idle.set()

    def _refusal(self, scope: Scope) -> tuple[int, str, str | None] | None:
        headers = dict(scope["headers"])
        is_api = scope["path"].startswith("/v1")
        if is_api and not self._has_key(headers.get(b"authorization", b"")):
            return 401, "missing or wrong API key; send it as Authorization: Bearer KEY", "invalid_api_key"
        if self.closing and (is_api or scope["path"] in ("/health", "/ping")):
            return 503, "the server is shutting down", None
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            return 413, _TOO_LARGE, None
        return None

    def _has_key(self, authorization: bytes) -> bool:
        if self._key is None:
            return True
        scheme, _, key = authorization.partition(b" ")
        # In constant time, so that how long a refusal takes tells nothing about the key.
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"


def _limited(receive: Receive) -> Receive:
    """`receive` that raises 413 once a body without a Content-Length has become too large."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise ApiError(413, _TOO_LARGE)
        return message

    return limited
