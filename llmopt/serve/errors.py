"""HTTP errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from llmopt.errors import InputError, LlmoptError


class ApiError(HTTPException):
    """An answer other than 200: what is wrong, and what would be right."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message)
        self.param = param
        self.code = code


class EngineStopped(LlmoptError):
    """The engine ended before it had finished a request; HTTP 500."""


class Unavailable(LlmoptError):
    """The server takes no request now; HTTP 503."""


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error answer; also the last event of a stream that fails."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code or status}}


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(status, message, param, code), status_code=status)


def status_of(error: LlmoptError) -> int:
    """The HTTP status of an error: 400 where the request is to blame."""
    if isinstance(error, InputError):
        return 400
    return 503 if isinstance(error, Unavailable) else 500


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message about a name that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"unknown {kind} {name!r:.80}" + (f"; did you mean {near[0]!r}?" if near else "")


def add_error_handlers(app: FastAPI, fields: Mapping[str, Sequence[str]]) -> None:
    """Answer every error in OpenAI's shape; `fields` are the known fields of the body at each path."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        param, code = (error.param, error.code) if isinstance(error, ApiError) else (None, None)
        message = str(error.detail)
        if not isinstance(error, ApiError) and error.status_code == 404:
            message = f"there is nothing at {request.url.path:.200}"
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
        response = error_response(error.status_code, message, param, code)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        message, param = describe(error.errors()[0], fields.get(request.url.path, ()))
        return error_response(400, message, param)

    @app.exception_handler(LlmoptError)
    async def llmopt_error(request: Request, error: LlmoptError) -> Response:
        return error_response(status_of(error), str(error))

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception) -> Response:
        return error_response(500, "internal error; the server's log says more")


def describe(error: Mapping[str, Any], known: Sequence[str]) -> tuple[str, str | None]:
    """One of pydantic's complaints about a body as one line, and the field it is about."""
    path = error["loc"][1:]  # the first part is "body"
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error['ctx']['error']} at character {path[0]}", None
    if not path:
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    # Cut and cleaned, because JSON can hold names of any length, and names that are no text.
    field = ".".join(str(part) for part in path)[:200].encode(errors="replace").decode()
    if error["type"] == "extra_forbidden":
        return unknown("field", field, known if len(path) == 1 else ()), field
    if error["type"] == "missing":
        return f"{field} is missing", field
    text = str(error["msg"]).removeprefix("Value error, ")
    return f"{field}: {text[0].lower()}{text[1:]}", field
