"""Routes about the endpoint itself: whether it is up, whether it is ready, and the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serving.http.routes import PUBLIC, Context, ResponseModel

router = APIRouter()


class Health(ResponseModel):
    """Answer of `/healthz`."""

    status: Literal["ok"]


class Readiness(ResponseModel):
    """Answer of `/readyz`."""

    status: Literal["ready", "loading"]


@router.get("/healthz", tags=[PUBLIC], response_model=Health)
async def healthz() -> Response:
    """Says that this process is up."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", tags=[PUBLIC], response_model=Readiness, responses={503: {"model": Readiness}})
async def readyz(context: Context) -> Response:
    """Says whether the model is loaded and its engine answers; 503 if not."""
    if await context.backend.is_ready():
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "loading"}, status_code=503)


@router.get("/openapi.json", tags=["admin"], include_in_schema=False)
async def openapi_schema(request: Request) -> Response:
    """Returns the OpenAPI document: all routes, their parameters and their answers."""
    return JSONResponse(request.app.openapi())
