"""The admins' routes to model versions: they register versions, promote them, try them as a canary, and roll back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import asdict
from typing import Annotated, TypeVar

from fastapi import APIRouter, Request
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from alignment.errors import AlignmentError
from serving.http.routes import ChosenModel, ModelContext, ParsedBodyRoute, ResponseModel, key_of
from serving.registry.checkpoints import local_path
from serving.registry.state import State
from serving.registry.versions import Version
from serving.replica.engine import Status
from serving.schema import RequestError

router = APIRouter(tags=["admin"], route_class=ParsedBodyRoute)

Result = TypeVar("Result")


class VersionBody(BaseModel):
    """Body of `POST /v1/admin/versions`."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    checkpoint: Annotated[str, Field(min_length=1, max_length=4096)]
    """Folder of the checkpoint, as the machine of the ingress sees it, or its address in a storage, as `s3://…`."""


class PromoteBody(BaseModel):
    """Body of `POST /v1/admin/promote`."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    version: Annotated[int, Field(ge=1, le=10**9)]
    canary: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Fraction of the requests that the version answers as a canary beside the current version; None makes it the
    current version."""


class VersionList(ResponseModel):
    """Answer of `GET /v1/admin/versions`."""

    versions: list[Version]
    state: State
    replicas: list[Status]
    candidate: Status | None


class DeletedVersion(ResponseModel):
    """Answer of `DELETE /v1/admin/versions/{number}`."""

    version: int
    freed_bytes: int


@router.get("/v1/admin/versions", response_model=VersionList)
async def versions(model: ChosenModel) -> Response:
    """Lists every version, which of them answer, and the status of every replica."""
    registry, backend = model.registry, model.backend
    all_versions = await asyncio.to_thread(registry.versions)
    replicas = [asdict(status) for status in await backend.statuses()]
    candidate = None if backend.candidate is None else asdict(backend.candidate)
    answer = {"versions": [asdict(version) for version in all_versions], "state": asdict(registry.state())}
    return JSONResponse({**answer, "replicas": replicas, "candidate": candidate})


@router.post("/v1/admin/versions", response_model=Version)
async def add(body: VersionBody, model: ChosenModel) -> Response:
    """Verifies a checkpoint and registers it as a version. Nothing else changes."""
    return JSONResponse(asdict(await _or_conflict(asyncio.to_thread(_register, model, body.checkpoint))))


def _register(model: ModelContext, checkpoint: str) -> Version:
    current = model.registry.state().current
    return model.registry.add(local_path(checkpoint), parent=current, compatible_with=current)


@router.delete("/v1/admin/versions/{number}", response_model=DeletedVersion)
async def delete(number: Annotated[int, PathParameter(ge=1, le=10**9)], model: ChosenModel) -> Response:
    """Deletes the files of a version that is of no use any more, and returns how many bytes were freed."""
    num_bytes = await _or_conflict(asyncio.to_thread(_delete, model, number))
    return JSONResponse({"version": number, "freed_bytes": num_bytes})


def _delete(model: ModelContext, number: int) -> int:
    model.tenant.check()
    return model.registry.delete(number)


@router.post("/v1/admin/promote", response_model=State)
async def promote(body: PromoteBody, request: Request, model: ChosenModel) -> Response:
    """Brings a version to every replica and lets it answer all requests, or a fraction of them."""
    change = model.promotions.promote(body.version, body.canary, started_by=key_of(request).name)
    return JSONResponse(asdict(await _or_conflict(change)))


@router.delete("/v1/admin/canary", response_model=State)
async def end_canary(model: ChosenModel) -> Response:
    """Ends the canary; the current version answers all requests again."""
    return JSONResponse(asdict(await _or_conflict(model.promotions.end_canary())))


@router.post("/v1/admin/rollback", response_model=State)
async def rollback(request: Request, model: ChosenModel) -> Response:
    """Goes back to the version before."""
    return JSONResponse(asdict(await _or_conflict(model.promotions.roll_back(started_by=key_of(request).name))))


async def _or_conflict(change: Awaitable[Result]) -> Result:
    """Returns what a change returns.

    Raises:
        RequestError: 409, the change cannot be made, and why.
    """
    try:
        return await change
    except AlignmentError as error:
        raise RequestError(409, str(error)) from error
