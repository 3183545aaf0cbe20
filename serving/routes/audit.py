"""Who changed, exported or deleted something here; `serving.audit` writes it down."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response

from serving.routes import Service
from serving.routes.feedback import read


def routes(service: Service) -> APIRouter:
    """The router of this module."""
    router = APIRouter(tags=["admin"])

    @router.get("/v1/admin/audit")
    async def audit(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[str | None, Query(max_length=200)] = None,
    ) -> Response:
        """The newest entries, the newest first; `before` goes on where an earlier answer ended."""
        entries = await read(lambda: service.store.audit_trail(limit=limit, before=before))
        return JSONResponse({"object": "list", "data": [asdict(entry) for entry in entries]})

    return router
