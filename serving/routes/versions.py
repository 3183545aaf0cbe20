"""Admin routes: versions are registered, promoted, tried on a share of the requests, and taken back."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi import Path as FromPath
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from alignment.errors import AlignmentError
from serving.promotion import Promotions
from serving.registry import Version
from serving.routes import ReadRoute, Service, key_of
from serving.schema import Refused


class VersionBody(BaseModel):
    """Body of `POST /v1/admin/versions`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    checkpoint: Annotated[str, Field(min_length=1, max_length=4096)]
    """Folder, as the machine of the ingress sees it."""


class PromoteBody(BaseModel):
    """Body of `POST /v1/admin/promote`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Annotated[int, Field(ge=1, le=10**9)]
    canary: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the requests that it answers, as a trial beside the current one; None makes it the current one."""


def routes(service: Service) -> APIRouter:
    """The router of this module."""
    router = APIRouter(tags=["admin"], route_class=ReadRoute)
    registry, backend, tenant = service.registry, service.backend, service.tenant
    promotions = Promotions(registry, backend, check_lease=tenant.check)

    @router.get("/v1/admin/versions")
    async def versions() -> Response:
        """Every version, which of them answer, and what the replicas say."""
        known = await asyncio.to_thread(registry.versions)
        replicas = [asdict(status) for status in await backend.statuses()]
        candidate = None if backend.candidate is None else asdict(backend.candidate)
        told = {"versions": [asdict(version) for version in known], "state": asdict(registry.state())}
        return JSONResponse({**told, "replicas": replicas, "candidate": candidate})

    @router.post("/v1/admin/versions")
    async def add(body: VersionBody) -> Response:
        """Verifies a checkpoint and registers it; nothing else changes."""
        return JSONResponse(asdict(await _or_refused(asyncio.to_thread(registered, body.checkpoint))))

    def registered(checkpoint: str) -> Version:
        current = registry.state().current
        return registry.add(Path(checkpoint), parent=current, compatible_with=current)

    @router.delete("/v1/admin/versions/{number}")
    async def delete(number: Annotated[int, FromPath(ge=1, le=10**9)]) -> Response:
        """Deletes a version's files, which are of no use any more; says how many bytes were freed."""
        freed = await _or_refused(asyncio.to_thread(deleted, number))
        return JSONResponse({"version": number, "freed_bytes": freed})

    def deleted(number: int) -> int:
        tenant.check()
        return registry.delete(number)

    @router.post("/v1/admin/promote")
    async def promote(body: PromoteBody, request: Request) -> Response:
        """Brings a version to every replica and lets it answer: all requests, or a share of them."""
        asker = key_of(request).name
        return JSONResponse(asdict(await _or_refused(promotions.promote(body.version, body.canary, started_by=asker))))

    @router.delete("/v1/admin/canary")
    async def end_canary() -> Response:
        """Ends the trial; the current version answers everything again."""
        return JSONResponse(asdict(await _or_refused(promotions.end_canary())))

    @router.post("/v1/admin/rollback")
    async def rollback(request: Request) -> Response:
        """Goes back to the version before."""
        return JSONResponse(asdict(await _or_refused(promotions.roll_back(started_by=key_of(request).name))))

    return router


async def _or_refused(doing: Any) -> Any:
    try:
        return await doing
    except AlignmentError as error:
        raise Refused(409, str(error)) from error
