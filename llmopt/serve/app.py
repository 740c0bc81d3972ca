"""The routes."""

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from llmopt import __version__
from llmopt.serve.call import ServedModel
from llmopt.serve.chat import ChatCall
from llmopt.serve.completions import CompletionCall
from llmopt.serve.engine_client import EngineClient
from llmopt.serve.errors import ApiError, add_error_handlers, unknown
from llmopt.serve.metrics import Metrics
from llmopt.serve.schema import ChatRequest, CompletionRequest
from llmopt.serve.streaming import answer

FIELDS = {  # of the body at each path
    "/v1/completions": tuple(CompletionRequest.model_fields),
    "/v1/chat/completions": tuple(ChatRequest.model_fields),
}


def create_app(model: ServedModel, client: EngineClient, metrics: Metrics) -> FastAPI:
    """The HTTP application over a loaded model. The key and the closing time are the gate's affair."""
    # No pages of documentation: they would load scripts from elsewhere. /openapi.json is there.
    app = FastAPI(title="llmopt", version=__version__, docs_url=None, redoc_url=None)
    add_error_handlers(app, FIELDS)
    _add_completion_routes(app, model, client)
    _add_model_routes(app, model)
    _add_operation_routes(app, client, metrics)
    return app


def _add_completion_routes(app: FastAPI, model: ServedModel, client: EngineClient) -> None:
    # Calls are made in a thread, because they tokenize, and a long text must not hold up the others' streams.

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        _check_model(model, body.model)
        return await answer(http, await asyncio.to_thread(CompletionCall, body, model), client)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        _check_model(model, body.model)
        return await answer(http, await asyncio.to_thread(ChatCall, body, model), client)


def _add_model_routes(app: FastAPI, model: ServedModel) -> None:
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "llmopt",
            "max_model_len": model.ready.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in model.names]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_model(model, name)
        return card(name)


def _add_operation_routes(app: FastAPI, client: EngineClient, metrics: Metrics) -> None:
    @app.get("/health", response_model=None)
    @app.get("/ping", response_model=None)
    async def health() -> Response:
        client.check_available(0)  # raises Unavailable, which is 503, once the engine is gone
        return Response()

    @app.get("/metrics", response_model=None)
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _check_model(model: ServedModel, name: str | None) -> None:
    if name is not None and name not in model.names:
        message = f"{unknown('model', name, model.names)} (served: {', '.join(model.names)})"
        raise ApiError(404, message, "model", "model_not_found")
