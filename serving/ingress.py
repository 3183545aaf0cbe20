"""The HTTP front: our own FastAPI app, through which every request to the engine has to go.

It is up within seconds, before the model is, and holds no vLLM.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from serving.config import ServeConfig
from serving.schema import Refused, Reply, Route, event, refusal, sound_json
from serving.served import Served

READY_TIMEOUT_S = 2.0

# No pages of documentation: they load scripts from elsewhere.
app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


def as_response(reply: Reply) -> Response:
    """A reply as the HTTP response that it describes."""
    return Response(reply.body, status_code=reply.status, media_type="application/json")


@app.exception_handler(Refused)
async def _on_refused(_: Request, error: Refused) -> Response:
    return as_response(error.reply)


@app.exception_handler(HTTPException)
async def _on_http_error(_: Request, error: HTTPException) -> Response:
    return as_response(refusal(error.status_code, str(error.detail)))


@app.exception_handler(Exception)
async def _on_bug(_: Request, __: Exception) -> Response:
    return as_response(refusal(500, "Internal error."))


class Ingress:
    """The Ray Serve deployment that listens; `serving.app` joins it with `app`."""

    def __init__(self, engine: DeploymentHandle, config: ServeConfig, served: Served) -> None:
        self._engine = engine
        self._streaming = engine.options(stream=True)
        self._timeout_s = config.request_timeout_s
        self._max_body_bytes = int(config.max_body_mib * 2**20)
        self._cards = _cards(served)

    @app.get("/healthz")
    async def healthz(self) -> Response:
        """This process is up."""
        return JSONResponse({"status": "ok"})

    @app.get("/readyz")
    async def readyz(self) -> Response:
        """The model is loaded and its engine answers; 503 if not."""
        # Sent past the queue to every replica, so that a busy service stays a ready one.
        response = self._engine.broadcast("is_ready")
        try:
            answers = await response.results_async(timeout_s=READY_TIMEOUT_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):
            answers = []
        if True in answers:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "loading"}, status_code=503)

    @app.get("/v1/models")
    async def models(self) -> Response:
        """Every model that can be asked for."""
        return JSONResponse({"object": "list", "data": list(self._cards.values())})

    @app.get("/v1/models/{name:path}")
    async def model(self, name: str) -> Response:
        """One of them."""
        return JSONResponse(self._card(name))

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completions."""
        return await self._forward("chat", await self._body(request))

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        """OpenAI's completions."""
        return await self._forward("completions", await self._body(request))

    async def _body(self, request: Request) -> dict[str, Any]:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_body_bytes:
                raise Refused(413, f"The request body is larger than {self._max_body_bytes} bytes.")
        return sound_json(bytes(body))

    def _card(self, name: Any) -> dict[str, Any]:
        if not isinstance(name, str):
            raise Refused(400, f"model is required; it is one of {', '.join(self._cards)}.")
        if name not in self._cards:
            raise Refused(404, f"There is no model {name!r} here; there are {', '.join(self._cards)}.")
        return self._cards[name]

    async def _forward(self, route: Route, body: dict[str, Any]) -> Response:
        self._card(body.get("model"))
        parts = self._answers(route, body)
        first = await anext(parts)
        if isinstance(first, Reply):
            await parts.aclose()
            return as_response(first)
        return StreamingResponse(_events(first, parts), media_type="text/event-stream")

    async def _answers(self, route: Route, body: dict[str, Any]) -> AsyncGenerator[str | Reply]:
        """What the engine says, up to a failure or the deadline, which become the last part."""
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        parts = self._streaming.answer.remote(route, body)
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    part = await anext(parts, None)
                if part is None:
                    return
                yield part
        except TimeoutError:
            yield refusal(504, f"The answer was not complete after {self._timeout_s:g} seconds.")
        except (RayError, RayServeException):
            yield refusal(503, "The model is not available, or too many requests are waiting. Try again later.")
        finally:
            parts.cancel()  # a client that went away frees its place in the engine


async def _events(first: str, rest: AsyncGenerator[str | Reply]) -> AsyncIterator[str]:
    yield first
    async for part in rest:
        yield event(part) if isinstance(part, Reply) else part


def _cards(served: Served) -> dict[str, dict[str, Any]]:
    created = int(time.time())
    parents = {served.adapter.name: served.name} if served.adapter else {}
    return {
        name: {"id": name, "object": "model", "created": created, "owned_by": "raylign", "parent": parents.get(name)}
        for name in served.names
    }
