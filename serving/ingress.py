"""The HTTP front: our own FastAPI app, through which every request has to go.

It is up within seconds, before the model is, and holds neither vLLM nor torch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import ray
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from serving.audit import Audited, AuditTrail, folder_of
from serving.backend import Backend
from serving.config import ServeConfig
from serving.guard import Guard, as_response
from serving.ids import Ids
from serving.keys import KeptKeys, Key, Keys
from serving.lease import Tenant
from serving.meters import Meters, exposition
from serving.nodes import check_database
from serving.page import HEADERS, INDEX, PageFile, page_files
from serving.queues import num_waiting
from serving.recording import Recorder
from serving.registry import Registry
from serving.routes import (
    PUBLIC,
    VERSION_HEADER,
    Service,
    audit,
    authorise,
    feedback,
    openai,
    rewards,
    route_finder,
    versions,
)
from serving.schema import Refused, invalid, refusal
from serving.scrape import Figures, gather, page
from serving.served import ServedModel, check_here
from serving.store import Store
from serving.store.opening import default_database
from serving.store.records import StoreAway

NOT_HERE = {
    "/v1/responses": "The Responses API is not served; chats are answered at /v1/chat/completions.",
    "/v1/embeddings": "Embeddings are not served; this endpoint answers chats and completions, and rates answers.",
}
"""What is said at OpenAI's other routes."""
ANYBODY = Key(name="anybody", role="admin")
"""Who asks where no keys are needed."""


class Ingress:
    """The Ray Serve deployment that listens."""

    def __init__(
        self,
        engine: DeploymentHandle,
        candidate: DeploymentHandle | None,
        scoring: DeploymentHandle,
        config: ServeConfig,
        served: ServedModel,
        registry: str,
        owner: str,
    ) -> None:
        logging.getLogger("alembic").setLevel(logging.WARNING)
        check_here(Registry(Path(registry)))
        database = config.feedback.database or default_database(Path(registry))
        check_database(database, num_nodes=sum(node["Alive"] for node in ray.nodes()))
        self._config = config
        kept_keys = KeptKeys(Path(registry), database)
        self._store = _opened(database, config, is_known=kept_keys.read() is not None)
        versions_of_model = Registry(Path(registry))
        meters = Meters()
        meters.waits("engine", num_waiting)
        self._trail = AuditTrail(self._store, folder_of(versions_of_model), on_loss=meters.audit_lost)
        self._keys = Keys(self._store, kept_keys)
        self._recorder = Recorder(self._store, versions_of_model.folder / "unstored", on_loss=meters.record_lost)
        here = serve.get_replica_context()
        self._name = here.replica_id.unique_id
        self._ingresses = serve.get_deployment_handle(here.deployment, here.app_name)
        if "/" not in owner:  # a cluster's, which may have several endpoints
            owner = f"{owner}/{here.app_name}"
        tenant = Tenant(versions_of_model, owner=owner, url=config.url)
        tenant.acquire(wait=True)
        self._service = Service(
            config=config,
            served=served,
            backend=Backend(engine, scoring, config, versions_of_model, model=served.name, candidate=candidate),
            store=self._store,
            registry=versions_of_model,
            meters=meters,
            ids=Ids(versions_of_model.folder),
            recorder=self._recorder,
            tenant=tenant,
        )

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve once."""
        await self._service.backend.begin()
        app = application(self._service, self.metrics)
        routes = [route for route in app.routes if isinstance(route, APIRoute)]
        public = {route.path for route in routes if route.tags == [PUBLIC]}
        guard = Guard(
            Audited(app, self._trail),
            who=(lambda _: ANYBODY) if self._config.no_keys else self._keys.who,
            is_public=lambda path: path in public,
            limits=self._config.limits,
            local_only=self._config.no_keys,
            cors_origins=self._config.cors_origins,
            meters=self._service.meters,
            route_of=route_finder(routes),
        )
        return with_cors(guard, self._config.cors_origins)

    async def obstacle(self) -> str | None:
        """What keeps the endpoint from answering; None if it has answered. Asked by `raylign serve`, without a key."""
        return await self._service.backend.obstacle()

    async def figures(self) -> Figures:
        """What this ingress has counted; another one asks."""
        return Figures(ingress=self._name, metrics=self._service.meters.figures())

    async def metrics(self) -> bytes:
        """What all ingresses have counted, for Prometheus."""
        metrics = page(
            await self.figures(),
            await gather(self._ingresses),
            self._service.backend.state,
            records_waiting=self._recorder.num_waiting,
            audit_waiting=self._trail.num_waiting,
        )
        return await asyncio.to_thread(exposition, metrics)

    def __del__(self) -> None:
        """Called by Ray Serve when this stops: what waits is still written."""
        self._service.tenant.close()
        self._keys.close()
        self._trail.close()
        self._recorder.close()
        self._store.close()


def _opened(database: str, config: ServeConfig, *, is_known: bool) -> Store:
    """The database, which may be away if this endpoint has run with it before (`is_known`).

    Raises:
        StoreAway: it is, and this endpoint has not.
    """
    try:
        return Store(database, retention_days=config.feedback.retention_days, may_be_away=is_known)
    except StoreAway as error:
        raise StoreAway(
            f"{error}. An endpoint starts without its database (feedback.database) only after it has run with it, when "
            "it knows the keys"
        ) from error


def with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Tells browsers which pages elsewhere may ask; without any, they let none."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],  # OpenAI's client says in a dozen of its own what it is
        expose_headers=["retry-after", VERSION_HEADER],
    )


def application(service: Service, metrics: Callable[[], Awaitable[bytes]]) -> FastAPI:
    """All routes. They trust that `Guard` stands in front. `metrics`: what `/metrics` answers."""
    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="raylign", openapi_url=None, docs_url=None, redoc_url=None, dependencies=[Depends(authorise)])
    for router in (
        _own(service, metrics),
        _page(),
        openai.routes(service),
        rewards.routes(service),
        feedback.routes(service),
        versions.routes(service),
        audit.routes(service),
    ):
        app.include_router(router)

    answer_errors(app)
    return app


def answer_errors(app: FastAPI) -> None:
    """Has what routes raise answered in OpenAI's form."""

    @app.exception_handler(Refused)
    async def on_refused(_: Request, error: Refused) -> Response:
        return as_response(error.reply)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        return as_response(invalid(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        detail = str(error.detail)
        if error.status_code == 404:
            detail = (
                NOT_HERE.get(request.url.path) or f"There is no route {request.method} {request.url.path[:100]} here."
            )
        return as_response(refusal(error.status_code, detail))

    @app.exception_handler(Exception)
    async def on_bug(_: Request, __: Exception) -> Response:
        return as_response(refusal(500, "Internal error."))  # `Guard` writes down where it was


def _own(service: Service, metrics: Callable[[], Awaitable[bytes]]) -> APIRouter:
    """Health and figures."""
    router = APIRouter()

    @router.get("/healthz", tags=[PUBLIC])
    async def healthz() -> Response:
        """This process is up."""
        return JSONResponse({"status": "ok"})

    @router.get("/readyz", tags=[PUBLIC])
    async def readyz() -> Response:
        """The model is loaded and its engine answers; 503 if not."""
        if await service.backend.is_ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "loading"}, status_code=503)

    @router.get("/metrics", tags=[PUBLIC if service.config.public_metrics else "monitor"])
    async def for_prometheus() -> Response:
        """Figures of all ingresses for Prometheus."""
        return Response(await metrics(), media_type="text/plain; version=0.0.4")

    @router.get("/openapi.json", tags=["admin"], include_in_schema=False)
    async def openapi_schema(request: Request) -> Response:
        """All routes and their parameters."""
        return JSONResponse(request.app.openapi())

    return router


def _page() -> APIRouter:
    """The page for people, which holds no data: what it shows, it asks for with the key that it is given."""
    router = APIRouter()

    def add(path: str, file: PageFile) -> None:
        @router.get(path, tags=[PUBLIC], include_in_schema=False)
        async def sent() -> Response:
            return Response(file.body, media_type=file.media_type, headers=dict(HEADERS))

    for name, file in page_files().items():
        add("/" if name == INDEX else f"/page/{name}", file)
    return router
