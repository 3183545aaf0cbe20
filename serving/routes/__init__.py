"""What the endpoint answers, one module per subject. A route's tag is the role that a key needs for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from serving.backend import Backend
from serving.config import ServeConfig
from serving.ids import Ids
from serving.keys import Key
from serving.lease import Tenant
from serving.meters import NONE, Meters
from serving.recording import Recorder
from serving.registry import Registry
from serving.schema import Refused
from serving.served import ServedModel
from serving.shares import KeyShare
from serving.store import Store

PUBLIC = "public"
"""Tag of routes that need no key."""
VERSION_HEADER = "x-model-version"


@dataclass(frozen=True, kw_only=True)
class Service:
    """All that routes use."""

    config: ServeConfig
    served: ServedModel
    backend: Backend
    store: Store
    registry: Registry
    meters: Meters
    tenant: Tenant
    """What says whether the registry belongs to this endpoint."""
    ids: Ids
    recorder: Recorder


class _ReadRequest(Request):
    """A request whose body was read already."""

    async def json(self) -> Any:
        """What `serving.guard` made of the body: a large one beside the event loop, where others are answered."""
        return self.scope["state"]["json"]


class ReadRoute(APIRoute):
    """A route with a body, which is not read a second time."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI asks for it."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            return await handle(_ReadRequest(request.scope, request.receive))

        return handled


def route_finder(routes: Iterable[APIRoute]) -> Callable[[str], str]:
    """Finds the path of the route that a request's path leads to, as `/v1/models/{name}`; `none` if there is none."""
    known = list(routes)
    fixed = {route.path for route in known if not route.param_convertors}
    others = [route for route in known if route.param_convertors]

    def route_of(path: str) -> str:
        if path in fixed:
            return path
        return next((route.path for route in others if route.path_regex.match(path)), NONE)

    return route_of


def key_of(request: Request) -> Key:
    """The key that a request came with; `serving.guard` let nothing in without one."""
    key = request.scope["state"]["key"]
    assert isinstance(key, Key), "only public routes go without"
    return key


def spend_form_seconds(request: Request, seconds: float) -> None:
    """Takes the CPU seconds that the form of an answer cost from what its key may spend on forms."""
    share = request.scope["state"].get("share")
    if seconds and isinstance(share, KeyShare):
        share.form_seconds.spend(seconds, time.monotonic())


def authorise(request: Request) -> None:
    """Checks a request's key against its route. Who adds a route without a tag has opened it to admins alone.

    Raises:
        Refused: 403, the key's role is not enough.
    """
    needed: Any = next(iter(request.scope["route"].tags), "admin")
    if needed != PUBLIC and not key_of(request).may(needed):
        raise Refused(403, f"This needs a key with the role {needed}, and yours is {key_of(request).role}.")


def wanted_version(request: Request) -> int | None:
    """The version that a request asks for by its header; None if it leaves that to the service.

    Raises:
        Refused: 400 it is no number, 403 the key may not choose.
    """
    value = request.headers.get(VERSION_HEADER)
    if value is None:
        return None
    if not key_of(request).may("labeller"):
        raise Refused(403, f"Choosing a version by {VERSION_HEADER} needs a key with the role labeller.")
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise Refused(400, f"{VERSION_HEADER} has to be the number of a version.")
    return int(value)
