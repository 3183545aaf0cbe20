"""The HTTP routes, one module per subject, each with a `router`. A route's tag is the role that a key needs for it."""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.dependencies.utils import get_flat_dependant
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict

from serving.config import ServeConfig
from serving.feedback.ids import Ids
from serving.feedback.keys import Key
from serving.feedback.recording import Recorder
from serving.feedback.store import Store
from serving.http.metrics import NONE, Metrics
from serving.http.shares import KeyShare
from serving.registry.lease import Tenant
from serving.registry.models import EndpointModel, ModelNotNamed, ServedModels, UnknownModel
from serving.registry.promotion import Promotions
from serving.replica.backend import Backend
from serving.schema import RequestError

PUBLIC = "public"
"""Tag of the routes that need no key."""
VERSION_HEADER = "x-model-version"
STRICT_PATHS = ("/v1/admin/", "/v1/feedback", "/v1/records")
"""The beginnings of paths whose queries may hold known names alone. OpenAI's clients send what they like elsewhere."""


@dataclass(frozen=True, kw_only=True)
class ModelContext(EndpointModel):
    """One model, as the routes of one ingress use it. Routes get it as a parameter of the type `ChosenModel`."""

    backend: Backend
    tenant: Tenant
    """Knows whether the registry belongs to this endpoint."""

    @cached_property
    def promotions(self) -> Promotions:
        """The changes of version that this ingress makes."""
        return Promotions(self.registry, self.backend, check_lease=self.tenant.check)


@dataclass(frozen=True, kw_only=True)
class IngressContext:
    """Everything that the routes of one ingress share. Routes get it as a parameter of the type `Context`."""

    config: ServeConfig
    models: ServedModels[ModelContext]
    store: Store
    metrics: Metrics
    ids: Ids
    recorder: Recorder
    started_at: int = field(default_factory=lambda: int(time.time()))
    """When the ingress started: UTC, whole Unix seconds."""


async def get_context(request: Request) -> IngressContext:
    """Returns the context of the application that a request came to.

    It is a coroutine, since FastAPI would call a plain function in a thread of its own.
    """
    context: IngressContext = request.app.state.context
    return context


Context = Annotated[IngressContext, Depends(get_context)]
ModelQuery = Annotated[
    str | None,
    Query(alias="model", max_length=200, description="Name of the model; needed where the endpoint has several."),
]


def choose_model(name: str | None, request: Request, context: IngressContext) -> ModelContext:
    """Returns the model that a request names; the only one if it names none. The request is counted as the model's.

    Raises:
        RequestError: 404, there is no model of this name; 400, there are several, and the request names none.
    """
    try:
        model = context.models.choose(name)
    except UnknownModel as error:
        raise RequestError(404, str(error), code="model_not_found", param="model") from error
    except ModelNotNamed as error:
        raise RequestError(400, str(error), code="missing_required_parameter", param="model") from error
    request.scope["state"]["model"] = model.id
    return model


def answering_model(name: str, request: Request, context: IngressContext) -> ModelContext:
    """Returns the model whose replicas answer requests for a name, which may be that of its base.

    Raises:
        RequestError: 404, there is no model of this name.
    """
    model = find_answering(name, context)
    request.scope["state"]["model"] = model.id
    return model


def find_answering(name: str, context: IngressContext) -> ModelContext:
    """Returns the same model; the request is not counted as its own.

    Raises:
        RequestError: 404, there is no model of this name.
    """
    try:
        return context.models.answering(name)
    except UnknownModel as error:
        raise RequestError(404, str(error), code="model_not_found", param="model") from error


async def chosen_model(request: Request, context: Context, name: ModelQuery = None) -> ModelContext:
    """Returns the model that the query parameter `model` names, as `choose_model`.

    It is a coroutine for the same reason as `get_context`.
    """
    return choose_model(name, request, context)


ChosenModel = Annotated[ModelContext, Depends(chosen_model)]


class _ParsedBodyRequest(Request):
    """A request whose body was parsed before it came to the route."""

    async def json(self) -> Any:
        """Returns what `serving.http.access` parsed: a large body is parsed in a thread, while others are answered."""
        return self.scope["state"]["json"]


class ParsedBodyRoute(APIRoute):
    """A route with a body. It uses the body that `serving.http.access` parsed, and does not parse it a second time."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns FastAPI's own handler, which is given a request with the parsed body."""
        handle = super().get_route_handler()

        async def handle_parsed(request: Request) -> Response:
            return await handle(_ParsedBodyRequest(request.scope, request.receive))

        return handle_parsed


class ResponseModel(BaseModel):
    """What an answer holds, for the OpenAPI document. Routes send their answers as they are, and check none."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class OpenResponseModel(ResponseModel):
    """An answer to which the engine may add other fields."""

    model_config = ConfigDict(extra="allow")


class ErrorDetail(ResponseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    """The field of the request that the error is about."""
    code: str | None
    """A short name of the error, for programs."""


class ErrorBody(ResponseModel):
    """Body of every answer with a status of 400 and more."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused"},
    "5XX": {"model": ErrorBody, "description": "The request failed"},
}
"""The errors of every route, for the OpenAPI document."""
ERRORS_BESIDE_TEXT: dict[int | str, dict[str, Any]] = {
    status: {
        "description": error["description"],
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
    }
    for status, error in ERRORS.items()
}
"""The same for routes whose answers are no JSON: FastAPI would give their errors the answers' media type."""


def routers() -> list[APIRouter]:
    """Returns the `router` of every module in this folder that has one, in the order of the modules' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [module.router for module in modules if "router" in vars(module)]


def route_finder(routes: Iterable[APIRoute]) -> Callable[[str], str]:
    """Returns a function from a request's path to its route's path, as `/v1/models/{name}`; `none` where none fits."""
    all_routes = list(routes)
    static_paths = {route.path for route in all_routes if not route.param_convertors}
    parametric_routes = [route for route in all_routes if route.param_convertors]

    def route_of(path: str) -> str:
        if path in static_paths:
            return path
        return next((route.path for route in parametric_routes if route.path_regex.match(path)), NONE)

    return route_of


def key_of(request: Request) -> Key:
    """Returns the key that a request came with. Without one, `serving.http.access` lets in public requests alone."""
    key = request.scope["state"]["key"]
    assert isinstance(key, Key), "only public routes have no key"
    return key


def parsed_body(request: Request) -> dict[str, Any]:
    """Returns a request's body as the client sent it; a body model has only the fields that the model names."""
    body: dict[str, Any] = request.scope["state"]["json"]
    return body


def spend_form_seconds(request: Request, seconds: float) -> None:
    """Takes the CPU seconds that compiling an answer's form cost from what its key may spend on forms."""
    share = request.scope["state"].get("share")
    if seconds and isinstance(share, KeyShare):
        share.form_seconds.spend(seconds, time.monotonic())


async def authorise(request: Request) -> None:
    """Checks a request's key against its route. A route without a tag is open to admins alone.

    It is a coroutine for the same reason as `get_context`.

    Raises:
        RequestError: 403, the key's role is not enough; 400, the query has a name that the route does not read.
    """
    required_role: Any = next(iter(request.scope["route"].tags), "admin")
    if required_role != PUBLIC and not key_of(request).allows(required_role):
        raise RequestError(403, f"This needs a key with the role {required_role}, and yours is {key_of(request).role}.")
    if request.scope["path"].startswith(STRICT_PATHS):
        _check_query(request)


def _check_query(request: Request) -> None:
    """Refuses names in the query that the route does not read: a misspelt one would be passed over."""
    known = {parameter.alias for parameter in get_flat_dependant(request.scope["route"].dependant).query_params}
    for name in request.query_params:
        if name not in known:
            raise RequestError(400, f"Unknown parameter: {name[:100]!r}.", code="unknown_parameter", param=name[:100])


def requested_version(request: Request) -> int | None:
    """Returns the version that a request asks for by its header; None leaves the version to the service.

    Raises:
        RequestError: 400, it is no number; 403, the key may not choose a version.
    """
    value = request.headers.get(VERSION_HEADER)
    if value is None:
        return None
    if not key_of(request).allows("labeller"):
        raise RequestError(403, f"Choosing a version by {VERSION_HEADER} needs a key with the role labeller.")
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise RequestError(400, f"{VERSION_HEADER} has to be the number of a version.")
    return int(value)
