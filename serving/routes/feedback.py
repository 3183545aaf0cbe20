"""Where people say what they prefer: comparisons, judgements, and their way back into training."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.fields import turns
from serving.issuing import number_of, prompt_of, why_unrecorded
from serving.routes import ReadRoute, Service, key_of
from serving.routes.openai import Messages, Tokens, whole
from serving.schema import Refused, Route
from serving.store.records import (
    BadVerdict,
    Choice,
    Conflict,
    Correction,
    Issued,
    IssuedAnswer,
    Judgement,
    Ranking,
    StoreAway,
    StoreError,
    StoreFull,
    Thumb,
    UnknownId,
    Verdict,
)

STATUS = {UnknownId: 404, Conflict: 409, BadVerdict: 400, StoreFull: 507, StoreAway: 503}
ATTEMPTS = 3
"""Draws of two answers, in case a choice between them would teach nothing."""
TEMPERATURE = 0.8
RETRY_S = 1.0

Id = Annotated[str, Field(min_length=1, max_length=200)]
Kept = TypeVar("Kept")


class ComparisonBody(BaseModel):
    """Body of `/v1/comparisons`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    messages: Messages | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    model: Annotated[str, Field(max_length=200)] | None = None
    versions: Annotated[list[Annotated[int, Field(ge=1, le=10**9)]], Field(min_length=2, max_length=2)] | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class FeedbackBody(BaseModel):
    """Body of `/v1/feedback`; which fields it has depends on its kind."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: Literal["choice", "thumb", "ranking", "correction"]
    id: Id
    winner: Id | None = None
    up: bool | None = None
    order: Annotated[list[Id], Field(min_length=2, max_length=100)] | None = None
    text: Annotated[str, Field(min_length=1, max_length=100_000)] | None = None
    comment: Annotated[str, Field(max_length=2000)] | None = None

    @model_validator(mode="after")
    def _what_its_kind_needs(self) -> Self:
        fields = {"choice": "winner", "thumb": "up", "ranking": "order", "correction": "text"}
        for kind, field in fields.items():
            if (getattr(self, field) is not None) != (kind == self.kind):
                raise ValueError(f"a {self.kind} has the field {fields[self.kind]}, and none of the other kinds'")
        return self

    @property
    def verdict(self) -> Verdict:
        """The same as the store knows it."""
        if self.winner is not None:
            return Choice(winner=self.winner)
        if self.up is not None:
            return Thumb(up=self.up)
        if self.order is not None:
            return Ranking(order=tuple(self.order))
        assert self.text is not None
        return Correction(text=self.text)


def routes(service: Service) -> APIRouter:
    """The router of this module."""
    router = APIRouter(route_class=ReadRoute)
    config, store = service.config, service.store

    @router.post("/v1/comparisons", tags=["labeller"])
    async def comparisons(request: Request, body: ComparisonBody) -> Response:
        """Two answers to one prompt, in random order, for a person to choose between."""
        if not config.feedback.record:
            message = "This service keeps no texts (feedback.record is off), so nobody could learn from it."
            raise Refused(409, message, code="not_recorded")
        asked = question(request, body)
        said = await to_compare(
            lambda: asyncio.gather(
                *(answer(asked, version, is_named=body.versions is not None) for version in versions(body))
            )
        )
        id = f"cmp-{service.ids.fresh()}"
        answers = [
            IssuedAnswer(
                id=f"{id}-{place}",
                text=one.text,
                version=one.version,
                model=service.served.name,
                finish_reason=one.finish_reason,
            )
            for place, one in enumerate(said)
        ]
        issued = Issued(
            id=id,
            kind="comparison",
            prompt=prompt_of(asked),
            answers=tuple(answers),
            asked_by=key_of(request).name,
            created=time.time(),
            recorded=True,
        )
        await kept(store.record(issued))
        shown = random.sample(answers, 2)
        told = {"id": id, "object": "comparison", "answers": [{"id": one.id, "text": one.text} for one in shown]}
        return JSONResponse(told)

    def question(request: Request, body: ComparisonBody) -> dict[str, Any]:
        if body.model not in (None, service.served.name):
            raise Refused(404, f"Versions of {service.served.name} are compared here.")
        sent = request.scope["state"]["json"]
        asked = {"prompt": body.prompt} if body.messages is None else {"messages": turns(sent["messages"])}
        if reason := why_unrecorded(asked):
            raise Refused(400, f"Nobody could learn from this comparison: {reason}.")
        temperature = TEMPERATURE if body.temperature is None else body.temperature
        # Null leaves it to the engine; without the field, a text's completion would have OpenAI's 16 tokens.
        limit = None if body.max_tokens is None else min(body.max_tokens, config.limits.max_tokens)
        return {**asked, "model": service.served.name, "max_tokens": limit, "temperature": temperature}

    def versions(body: ComparisonBody) -> tuple[int | None, int | None]:
        """Those asked for; else the current one and the canary; else twice what answers, also during a promotion."""
        if body.versions is not None:
            return body.versions[0], body.versions[1]
        state = service.registry.state()
        return (None, None) if state.canary is None else (state.current, state.canary)

    async def answer(asked: dict[str, Any], version: int | None, *, is_named: bool) -> Said:
        seeded = {**asked, "seed": random.getrandbits(62), "request_id": service.ids.fresh()}
        route: Route = "chat" if "messages" in asked else "completions"
        reply = await whole(service.backend.ask(route, seeded, version))
        if reply.status == 409 and not is_named:  # a promotion or the end of a trial came between
            reply = await whole(service.backend.ask(route, seeded))
        if reply.status != 200:
            raise Refused.by(reply)
        whole_answer = json.loads(reply.body)
        service.meters.generated(reply.version, whole_answer.get("usage"))
        return Said.of(whole_answer, number_of(reply.version))

    @router.post("/v1/feedback", tags=["labeller"])
    async def feedback(
        request: Request,
        body: FeedbackBody,
        idempotency_key: Annotated[str | None, Header(max_length=200, pattern=r"^[\x20-\x7e]+$")] = None,
    ) -> Response:
        """Keeps a judgement; when this answers, it is on the disk."""
        judgement = Judgement(
            target=body.id,
            verdict=body.verdict,
            labeller=key_of(request).name,
            comment=body.comment,
            key=idempotency_key,
        )
        receipt = await kept(store.judge(judgement), may_come=lambda: may_come(body.id))
        service.meters.judged(body.kind)
        told = asdict(receipt) | {"object": "feedback", "created": int(receipt.created)}
        return JSONResponse(told)

    @router.get("/v1/feedback/export", tags=["admin"])
    async def export(
        since: Annotated[str | None, Query(max_length=200)] = None,
        limit: Annotated[int | None, Query(ge=1, le=10**6)] = None,
    ) -> Response:
        """Training rows as JSON lines; `raylign train` reads them."""
        rows = await read(lambda: store.export(since=since, limit=limit))
        return StreamingResponse(rows, media_type="application/x-ndjson")

    @router.get("/v1/feedback/statistics", tags=["labeller"])
    async def statistics() -> Response:
        """How much there is, and how far people agree."""
        return JSONResponse(asdict(await read(store.statistics)))

    @router.delete("/v1/records/{id}", tags=["admin"])
    async def delete(id: Annotated[str, Field(max_length=200)]) -> Response:
        """Deletes what was kept of an answer, a comparison or a judgement, and what hangs on it."""
        waited = await asyncio.to_thread(service.recorder.forget, id)
        try:
            return JSONResponse({"deleted": await kept(store.delete(id)) + waited})
        except Refused:
            if not waited:
                raise
            return JSONResponse({"deleted": 1})

    def may_come(id: str) -> bool:
        """Whether an answer that the store does not know was issued, and is still on its way there."""
        age_s = service.ids.age_s(id)
        return age_s is not None and service.recorder.may_come(id, age_s)

    return router


@dataclass(frozen=True, kw_only=True)
class Said:
    """One answer of the engine."""

    text: str
    version: int
    finish_reason: str | None

    @classmethod
    def of(cls, answer: dict[str, Any], version: int) -> Said:
        choice = answer["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        return cls(text=text or "", version=version, finish_reason=choice["finish_reason"])


async def to_compare(draw: Callable[[], Awaitable[list[Said]]]) -> list[Said]:
    """Two answers whose comparison can become a training pair: neither is blank, and they differ.

    Args:
        draw: gives two answers; after `ATTEMPTS` times its last ones are taken as they are.
    """
    for _ in range(ATTEMPTS):
        said = await draw()
        texts = {one.text for one in said}
        if len(texts) == 2 and all(text.strip() for text in texts):
            break
    return said


async def kept(future: Future[Kept], *, may_come: Callable[[], bool] = lambda: False) -> Kept:
    """What the store answers when all is on the disk.

    Args:
        may_come: whether what the store does not know may be known soon.

    Raises:
        Refused: it keeps nothing of this, and why.
    """
    try:
        return await asyncio.wrap_future(future)
    except UnknownId as error:
        if await asyncio.to_thread(may_come):
            message = "The answer is not stored yet. Send this again."
            raise Refused(503, message, code="not_stored_yet", retry_after_s=RETRY_S) from error
        raise _refused(error) from error
    except StoreError as error:
        raise _refused(error) from error


async def read(reading: Callable[[], Kept]) -> Kept:
    """What the store finds.

    Raises:
        Refused: it cannot, and why.
    """
    try:
        return await asyncio.to_thread(reading)
    except StoreError as error:
        raise _refused(error) from error


def _refused(error: StoreError) -> Refused:
    status = STATUS.get(type(error), 500)
    return Refused(status, f"{error}.", retry_after_s=RETRY_S if status == 503 else None)
