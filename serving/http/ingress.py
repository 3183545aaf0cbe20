"""The HTTP front: a FastAPI application through which every request has to go.

It is up within seconds, before the model is, and imports neither vLLM nor torch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import ray
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from fastapi.routing import APIRoute
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from serving.config import ServeConfig
from serving.feedback.audit import AuditTrail, entries_folder
from serving.feedback.ids import Ids
from serving.feedback.keys import Key, KeyCache, Keys
from serving.feedback.recording import Recorder
from serving.feedback.store import Store
from serving.feedback.store.opening import default_database
from serving.feedback.store.records import StoreAway
from serving.garbage import freeze_heap
from serving.http.access import AccessMiddleware, as_response
from serving.http.audit import AuditMiddleware
from serving.http.metrics import Metrics, exposition
from serving.http.page import HEADERS, INDEX, PageFile, page_files
from serving.http.routes import (
    ERRORS,
    ERRORS_BESIDE_TEXT,
    PUBLIC,
    VERSION_HEADER,
    IngressContext,
    ModelContext,
    authorise,
    route_finder,
    routers,
)
from serving.http.scrape import IngressMetrics, gather, page
from serving.registry.lease import Tenant
from serving.registry.models import EndpointModel, ServedModels
from serving.registry.nodes import check_database
from serving.registry.served_model import check_here
from serving.registry.versions import Registry
from serving.replica.backend import Backend
from serving.replica.queues import num_waiting
from serving.schema import RequestError, error_reply, validation_error_reply

NOT_HERE = {
    "/v1/responses": "The Responses API is not served; chats are answered at /v1/chat/completions.",
    "/v1/embeddings": "Embeddings are not served; this endpoint answers chats and completions, and rates answers.",
}
"""What the answer 404 says at other routes of OpenAI's."""
ANYBODY = Key(name="anybody", role="admin")
"""The key of every request where no keys are needed."""


Deployment = TypeVar("Deployment")


@dataclass(frozen=True, kw_only=True)
class ModelDeployments(Generic[Deployment]):
    """The Ray Serve deployments of one model: bound ones where an application is built, and handles in the ingress."""

    engine: Deployment
    scoring: Deployment
    candidate: Deployment | None
    """Holds a canary of whole weights; None if versions are adapters."""


class Ingress:
    """The Ray Serve deployment that listens for requests."""

    def __init__(
        self,
        config: ServeConfig,
        models: ServedModels[EndpointModel],
        owner: str,
        deployments: Mapping[str, ModelDeployments[DeploymentHandle]],
    ) -> None:
        """
        Args:
            owner: owner of the registry's lease (see `serving.registry.lease`).
            deployments: by the names of the models.
        """
        for model in models.values():
            check_here(model.registry)
        version_registry = models.first.registry
        database = _check_database(config, version_registry)
        key_cache = KeyCache(version_registry.folder, database)
        self._config = config
        self._store = _open_store(database, config, is_known=key_cache.read() is not None)
        metrics = Metrics()
        metrics.track_waiting("engine", num_waiting)
        self._trail = AuditTrail(
            self._store, entries_folder(version_registry.folder), on_loss=metrics.count_lost_audit_entry
        )
        self._keys = Keys(self._store, key_cache)
        self._recorder = Recorder(self._store, version_registry.folder / "unstored", on_loss=metrics.count_lost_record)
        replica_context = serve.get_replica_context()
        self._name = replica_context.replica_id.unique_id
        self._ingresses = serve.get_deployment_handle(replica_context.deployment, replica_context.app_name)
        tenant = _acquire_lease(version_registry, owner, replica_context.app_name, config.url)
        self._tenant = tenant
        self._context = IngressContext(
            config=config,
            models=ServedModels([_model_context(model, deployments[model.id], tenant) for model in models.values()]),
            store=self._store,
            metrics=metrics,
            ids=Ids(version_registry.folder),
            recorder=self._recorder,
        )

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Returns the ASGI application. Ray Serve calls this once."""
        for model in self._context.models.values():
            await model.backend.begin()
        app = application(self._context, self.metrics)
        routes = [route for route in app.routes if isinstance(route, APIRoute)]
        public_paths = {route.path for route in routes if route.tags == [PUBLIC]}
        access = AccessMiddleware(
            AuditMiddleware(app, self._trail),
            authenticate=(lambda _: ANYBODY) if self._config.no_keys else self._keys.authenticate,
            is_public=lambda path: path in public_paths,
            limits=self._config.limits,
            local_only=self._config.no_keys,
            cors_origins=self._config.cors_origins,
            metrics=self._context.metrics,
            route_of=route_finder(routes),
        )
        freeze_heap()
        return with_cors(access, self._config.cors_origins)

    async def obstacles(self) -> dict[str, str | None]:
        """Returns what keeps each model from answering; None if it has answered. `raylign serve` calls this."""
        models = self._context.models
        obstacles = await asyncio.gather(*(model.backend.obstacle() for model in models.values()))
        return dict(zip(map(str, models), obstacles, strict=True))

    async def own_metrics(self) -> IngressMetrics:
        """Returns what this ingress has counted. The other ingresses call this."""
        return IngressMetrics(ingress=self._name, metrics=self._context.metrics.collect())

    async def metrics(self) -> bytes:
        """Returns what all ingresses have counted, in Prometheus' text format."""
        metrics = page(
            await self.own_metrics(),
            await gather(self._ingresses),
            {name: model.backend.state for name, model in self._context.models.items()},
            records_waiting=self._recorder.num_waiting,
            audit_waiting=self._trail.num_waiting,
        )
        return await asyncio.to_thread(exposition, metrics)

    def __del__(self) -> None:
        """Writes what still waits, and ends. Ray Serve calls this when the replica stops."""
        self._tenant.close()
        self._keys.close()
        self._trail.close()
        self._recorder.close()
        self._store.close()


def _model_context(
    model: EndpointModel, deployments: ModelDeployments[DeploymentHandle], tenant: Tenant
) -> ModelContext:
    """Returns a model as the routes use it."""
    backend = Backend(
        deployments.engine,
        deployments.scoring,
        model.config,
        model.registry,
        model=model.served_model.name,
        candidate=deployments.candidate,
    )
    return ModelContext(
        config=model.config,
        served_model=model.served_model,
        registry=model.registry,
        backend=backend,
        tenant=tenant,
    )


def _check_database(config: ServeConfig, registry: Registry) -> str:
    """Returns the URL of the endpoint's database, which every node of the cluster has to reach."""
    database = config.feedback.database or default_database(registry.folder)
    check_database(database, num_nodes=sum(node["Alive"] for node in ray.nodes()))
    return database


def _open_store(database: str, config: ServeConfig, *, is_known: bool) -> Store:
    """Opens the database. It may be away, if this endpoint has run with it before (`is_known`).

    Raises:
        StoreAway: it is away, and this endpoint has not run with it before.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        return Store(database, retention_days=config.feedback.retention_days, may_be_away=is_known)
    except StoreAway as error:
        raise StoreAway(
            f"{error}. An endpoint starts without its database (feedback.database) only after it has run with it, when "
            "it knows the keys"
        ) from error


def _acquire_lease(registry: Registry, owner: str, app_name: str, url: str) -> Tenant:
    """Waits for the registry's lease. An owner without a `/` is a cluster, which may have several endpoints."""
    tenant = Tenant(registry, owner=owner if "/" in owner else f"{owner}/{app_name}", url=url)
    tenant.acquire(wait=True)
    return tenant


def with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Returns the application with headers that tell browsers which pages elsewhere may ask; without origins, none."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],  # OpenAI's client describes itself in a dozen headers of its own
        expose_headers=["retry-after", VERSION_HEADER],
    )


def application(context: IngressContext, exposition: Callable[[], Awaitable[bytes]]) -> FastAPI:
    """Builds the application with all routes. They rely on `AccessMiddleware`, which stands in front.

    Args:
        exposition: returns the answer of `/metrics`.
    """
    app = FastAPI(
        title="raylign",
        # No pages of documentation: they load scripts from elsewhere.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(authorise)],
        responses=ERRORS,
    )
    app.state.context = context
    app.include_router(_metrics_router(exposition, is_public=context.config.public_metrics))
    app.include_router(_page_router())
    for router in routers():
        app.include_router(router)
    answer_errors(app)
    return app


def answer_errors(app: FastAPI) -> None:
    """Has what routes raise answered in OpenAI's form."""

    @app.exception_handler(RequestError)
    async def on_request_error(_: Request, error: RequestError) -> Response:
        return as_response(error.reply)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        return as_response(validation_error_reply(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        detail = str(error.detail)
        if error.status_code == 404:
            detail = (
                NOT_HERE.get(request.url.path) or f"There is no route {request.method} {request.url.path[:100]} here."
            )
        return as_response(error_reply(error.status_code, detail))

    @app.exception_handler(Exception)
    async def on_bug(_: Request, __: Exception) -> Response:
        return as_response(error_reply(500, "Internal error."))  # `AccessMiddleware` logs where it happened


def _metrics_router(exposition: Callable[[], Awaitable[bytes]], *, is_public: bool) -> APIRouter:
    """Returns the route for Prometheus, for whose figures a key may be needed."""
    router = APIRouter()

    @router.get(
        "/metrics",
        tags=[PUBLIC if is_public else "monitor"],
        response_class=PlainTextResponse,
        responses=ERRORS_BESIDE_TEXT,
    )
    async def metrics() -> Response:
        """Returns the metrics of all ingresses for Prometheus."""
        return Response(await exposition(), media_type="text/plain; version=0.0.4")

    return router


def _page_router() -> APIRouter:
    """Returns the files of the web page, which hold no data: the page asks for data with the key that it is given."""
    router = APIRouter()

    def add(path: str, file: PageFile) -> None:
        @router.get(path, tags=[PUBLIC], include_in_schema=False)
        async def page_file() -> Response:
            return Response(file.body, media_type=file.media_type, headers=dict(HEADERS))

    for name, file in page_files().items():
        add("/" if name == INDEX else f"/page/{name}", file)
    return router
