"""Routes about the endpoint itself: whether it is up, whether it is ready, and the OpenAPI document."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from serving.http.routes import PUBLIC, Context, ResponseModel
from serving.registry.model_id import ModelId
from serving.schema import RequestError

ReadyModel = Annotated[
    str | None,
    Query(alias="model", max_length=200, description="Name of one model, of which alone the answer tells."),
]

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
async def readyz(context: Context, name: ReadyModel = None) -> Response:
    """Says whether the model is loaded and its engine answers; 503 if not. Of several models, one has to answer."""
    if name is not None and name not in context.models:
        raise RequestError(404, "There is no such model here.", code="model_not_found", param="model")
    models = list(context.models.values()) if name is None else [context.models[ModelId(name)]]
    if any(await asyncio.gather(*(model.backend.is_ready() for model in models))):
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "loading"}, status_code=503)


@router.get("/openapi.json", tags=["admin"], include_in_schema=False)
async def openapi_schema(request: Request) -> Response:
    """Returns the OpenAPI document: all routes, their parameters and their answers."""
    return JSONResponse(request.app.openapi())
