"""Admin routes: versions are registered, promoted, tried on a share of the requests, and taken back."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from alignment.errors import AlignmentError
from serving.fits import check_fits
from serving.registry import State, Version
from serving.routes import Service
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
    router = APIRouter(tags=["admin"])
    registry, backend = service.registry, service.backend
    changing = asyncio.Lock()

    @router.get("/v1/admin/versions")
    async def versions() -> Response:
        """Every version, which of them answer, and what the replicas say."""
        known = await asyncio.to_thread(registry.versions)
        replicas = [asdict(status) for status in await backend.statuses()]
        told = [asdict(version) for version in known]
        return JSONResponse({"versions": told, "state": asdict(registry.state()), "replicas": replicas})

    @router.post("/v1/admin/versions")
    async def add(body: VersionBody) -> Response:
        """Verifies a checkpoint and registers it; nothing else changes."""
        return JSONResponse(asdict(await _or_refused(asyncio.to_thread(registered, body.checkpoint))))

    def registered(checkpoint: str) -> Version:
        current = registry.state().current
        return registry.add(Path(checkpoint), parent=current, fits=current)

    @router.post("/v1/admin/promote")
    async def promote(body: PromoteBody) -> Response:
        """Brings a version to every replica and lets it answer: all requests, or a share of them."""
        async with changing:
            return JSONResponse(asdict(await _or_refused(moved(body))))

    async def moved(body: PromoteBody) -> State:
        before = registry.state()
        await asyncio.to_thread(checked, body.version)
        if body.canary is not None and backend.is_whole:
            return await tried(body.version, body.canary, before)
        await backend.prepare(body.version)
        if body.canary is None:
            await asyncio.to_thread(registry.promote, body.version)
        else:
            await asyncio.to_thread(registry.canary, body.version, body.canary)
        return await adopted(before)

    async def tried(number: int, share: float, before: State) -> State:
        """Whole weights: a replica of its own, which the registry has to ask for, holds the canary."""
        await asyncio.to_thread(registry.canary, number, share)
        try:
            await backend.prepare(number, canary=True)
        except AlignmentError:
            await asyncio.to_thread(registry.restore, before)
            raise
        return await adopted(before)

    def checked(number: int) -> None:
        registry.verify(number)
        current = registry.folder_of(registry.state().current)
        check_fits(registry.folder_of(number), current, room=registry.room())

    async def adopted(before: State) -> State:
        """Has the replicas follow the registry, which is set back if one cannot."""
        try:
            await backend.adopt()
        except AlignmentError:
            await asyncio.to_thread(registry.restore, before)
            await backend.adopt()
            raise
        return registry.state()

    @router.delete("/v1/admin/canary")
    async def end_canary() -> Response:
        """Ends the trial; the current version answers everything again."""
        async with changing:
            return JSONResponse(asdict(await _or_refused(changed(registry.end_canary))))

    @router.post("/v1/admin/rollback")
    async def rollback() -> Response:
        """Goes back to the version before."""
        async with changing:
            return JSONResponse(asdict(await _or_refused(rolled_back())))

    async def rolled_back() -> State:
        state = registry.state()
        if state.canary is None and state.previous is not None:
            await asyncio.to_thread(checked, state.previous)
            await backend.prepare(state.previous)
        return await changed(registry.rollback)

    async def changed(change: Any) -> State:
        before = registry.state()
        await asyncio.to_thread(change)
        return await adopted(before)

    return router


async def _or_refused(doing: Any) -> Any:
    try:
        return await doing
    except AlignmentError as error:
        raise Refused(409, str(error)) from error
