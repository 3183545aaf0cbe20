"""The admins' route to the audit trail (`serving.feedback.audit`): who changed, exported or deleted something here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response

from serving.feedback.store.records import AuditEntry
from serving.http.routes import Context, ResponseModel
from serving.http.routes.feedback import read_store

router = APIRouter(tags=["admin"])


class AuditList(ResponseModel):
    """Answer of `/v1/admin/audit`."""

    object: Literal["list"]
    data: list[AuditEntry]


@router.get("/v1/admin/audit", response_model=AuditList)
async def audit(
    context: Context,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before_id: Annotated[str | None, Query(alias="before", max_length=200)] = None,
) -> Response:
    """Returns the newest entries, the newest first; `before` continues where an earlier answer ended."""
    entries = await read_store(lambda: context.store.audit_trail(limit=limit, before_id=before_id))
    return JSONResponse({"object": "list", "data": [asdict(entry) for entry in entries]})
