"""A small endpoint without a model: real HTTP, a real registry, and answers that are written down per version.

Its admin routes do what those of `serving.http.routes.versions` do, without replicas.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from alignment.errors import AlignmentError
from serving.registry.versions import Registry
from serving.schema import RequestError

MODEL = "assistant"


def broken(prompt: str) -> str:
    """What a version says that cannot answer: HTTP 500, told and not thrown, which would close the connection."""
    raise RequestError(500, "This went wrong.")


@dataclass(kw_only=True)
class Standin:
    """What the endpoint does; tests change it while it runs."""

    registry: Registry
    url: str = ""
    key: str | None = None
    """Bearer key that every request needs."""
    says: dict[int, Callable[[str], str]] = field(default_factory=dict)
    """By version: its answer to a prompt."""
    prefers: dict[int, Callable[[str], float]] = field(default_factory=dict)
    """By version: the log-ratio (nats) of a completion."""
    beta: float = 0.5
    rates_by_model: bool = False
    """True for an endpoint with a reward model, which knows no log-ratios."""
    busy: int = 0
    """Requests that are still turned away with 429."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the completions and rewards that were asked for, with `path` and `version`."""
    at_once: int = 0
    most_at_once: int = 0
    replicas: list[dict[str, Any]] = field(default_factory=list)
    """What replicas say of themselves."""
    candidate: dict[str, Any] | None = None
    """The same of the candidate's."""
    on_asked: Callable[[], object] = lambda: None
    """Called with every request for an answer."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def loaded(self) -> set[int]:
        state = self.registry.state()
        return {number for number in (state.current, state.canary, state.previous) if number}

    def answer(self, body: dict[str, Any], wanted: str | None, prompt: str) -> tuple[str, int]:
        """The text, and the version that it is of."""
        version = self.registry.state().current if wanted is None else int(wanted)
        if version not in self.loaded:
            raise RequestError(409, f"Version {version} is not loaded; {sorted(self.loaded)} are.")
        return self.says[version](prompt), version


def make_app(standin: Standin) -> FastAPI:
    app = FastAPI()
    registry = standin.registry

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(json.loads(error.reply.body), status_code=error.reply.status)

    @app.exception_handler(AlignmentError)
    async def conflict(_: Request, error: AlignmentError) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error)}}, status_code=409)

    @app.middleware("http")
    async def guard(request: Request, go_on: Any) -> Any:
        if standin.key and request.headers.getlist("authorization") != [f"Bearer {standin.key}"]:
            return JSONResponse({"error": {"message": "This needs a key."}}, status_code=401)
        with standin.lock:
            if standin.busy:
                standin.busy -= 1
                return JSONResponse({"error": {"message": "Too busy."}}, status_code=429, headers={"retry-after": "0"})
        return await go_on(request)

    @app.get("/v1/models")
    def models() -> Any:
        return {"data": [{"id": MODEL}, {"id": "base"}]}

    @app.post("/v1/chat/completions")
    def chat(request: Request, body: dict[str, Any]) -> Any:
        text, headers = asked(request, body, body["messages"][-1]["content"])
        return JSONResponse(
            {"choices": [{"message": {"content": text}, **ending(text)}], **usage(text)}, headers=headers
        )

    @app.post("/v1/completions")
    def completions(request: Request, body: dict[str, Any]) -> Any:
        text, headers = asked(request, body, body["prompt"])
        return JSONResponse({"choices": [{"text": text, **ending(text)}], **usage(text)}, headers=headers)

    def asked(request: Request, body: dict[str, Any], prompt: str) -> tuple[str, dict[str, str]]:
        with standin.lock:
            standin.at_once += 1
            standin.most_at_once = max(standin.most_at_once, standin.at_once)
        try:
            standin.on_asked()
            text, version = standin.answer(body, request.headers.get("x-model-version"), prompt)
        finally:
            with standin.lock:
                standin.at_once -= 1
        standin.asked.append({**body, "path": request.url.path, "version": version})
        return text, {"x-model-version": str(version)}

    def ending(text: str) -> dict[str, Any]:
        return {"index": 0, "finish_reason": "length" if text.endswith("…") else "stop"}

    def usage(text: str) -> dict[str, Any]:
        return {"usage": {"prompt_tokens": 1, "completion_tokens": len(text.split()), "total_tokens": 1}}

    @app.post("/v1/rewards")
    def rewards(body: dict[str, Any]) -> Any:
        standin.asked.append({**body, "path": "/v1/rewards"})
        items = []
        for item in body["items"]:
            assert all(item["completions"]), "the real one refuses empty completions"
            ratios = [standin.prefers[body["version"]](text) for text in item["completions"]]
            told = {} if standin.rates_by_model else {"logratios": ratios}
            items.append({"rewards": [standin.beta * ratio for ratio in ratios], "winner": None, **told})
        return {"object": "list", "model": MODEL, "version": body["version"], "items": items}

    @app.get("/v1/admin/versions")
    def versions() -> Any:
        told = [asdict(version) for version in registry.versions()]
        held = {"replicas": standin.replicas, "candidate": standin.candidate}
        return {"versions": told, "state": asdict(registry.state()), **held}

    @app.post("/v1/admin/versions")
    def add(body: dict[str, Any]) -> Any:
        current = registry.state().current
        return asdict(registry.add(Path(body["checkpoint"]), parent=current, compatible_with=current))

    @app.delete("/v1/admin/versions/{number}")
    def delete(number: int) -> Any:
        return {"version": number, "freed_bytes": registry.delete(number)}

    @app.post("/v1/admin/promote")
    def promote(body: dict[str, Any]) -> Any:
        registry.verify(body["version"])
        if body["canary"] is None:
            return asdict(registry.promote(body["version"]))
        return asdict(registry.canary(body["version"], body["canary"]))

    @app.delete("/v1/admin/canary")
    def end_canary() -> Any:
        return asdict(registry.end_canary())

    @app.post("/v1/admin/rollback")
    def rollback() -> Any:
        return asdict(registry.rollback())

    return app


@contextmanager
def running(registry: Registry) -> Iterator[Standin]:
    """The endpoint on a port of this machine, until the block ends."""
    standin = Standin(registry=registry)
    server = uvicorn.Server(uvicorn.Config(make_app(standin), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        standin.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield standin
        finally:
            server.should_exit = True
            thread.join()
