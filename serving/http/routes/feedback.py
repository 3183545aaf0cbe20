"""Where people say what they prefer: comparisons, feedback on answers, and the training rows that come of it."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal, Self, TypeVar

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.feedback.store.records import (
    BadVerdict,
    Choice,
    Conflict,
    Correction,
    Feedback,
    FeedbackKind,
    GenerationRecord,
    Ranking,
    RecordedAnswer,
    Statistics,
    StoreAway,
    StoreError,
    StoreFull,
    Thumb,
    UnknownId,
    UnknownIndex,
    Verdict,
)
from serving.feedback.transcript import prompt_of, unrecordable_reason, version_number
from serving.http.fields import to_engine_messages
from serving.http.routes import (
    ERRORS_BESIDE_TEXT,
    Context,
    IngressContext,
    ModelContext,
    ParsedBodyRoute,
    ResponseModel,
    choose_model,
    find_answering,
    key_of,
    parsed_body,
)
from serving.http.routes.bodies import Messages, TokenLimit
from serving.http.routes.openai import single_reply
from serving.schema import RequestError, Route

STATUS = {UnknownId: 404, UnknownIndex: 404, Conflict: 409, BadVerdict: 400, StoreFull: 507, StoreAway: 503}
"""The HTTP status of every error of the store; any other error has 500."""
ATTEMPTS = 3
"""How often two answers are generated until a choice between them can teach something."""
TEMPERATURE = 0.8
"""Sampling temperature of compared answers where the request sets none."""
RETRY_S = 1.0

Id = Annotated[str, Field(min_length=1, max_length=200)]
RecordedModel = Annotated[
    str | None, Query(max_length=200, description="Name of the model whose answers are meant; without it, all.")
]
Stored = TypeVar("Stored")

router = APIRouter(route_class=ParsedBodyRoute)


class ComparisonBody(BaseModel):
    """Body of `/v1/comparisons`."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    messages: Messages | None = None
    """The prompt, if it is a chat."""
    prompt: Annotated[str, Field(min_length=1)] | None = None
    """The prompt, if it is a text."""
    model: Annotated[str, Field(max_length=200)] | None = None
    """Name of the served model; needed where the endpoint has several."""
    versions: Annotated[list[Annotated[int, Field(ge=1, le=10**9)]], Field(min_length=2, max_length=2)] | None = None
    """The versions that answer. Without them, the current version and the canary answer; without a canary, the current
    version answers twice."""
    max_tokens: TokenLimit | None = None
    """Most tokens of an answer, up to `limits.max_tokens`."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Sampling temperature; without it 0.8."""

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class ComparedAnswer(ResponseModel):
    """One of the two answers of a comparison."""

    id: str
    text: str


class Comparison(ResponseModel):
    """Answer of `/v1/comparisons`."""

    id: str
    object: Literal["comparison"]
    answers: list[ComparedAnswer]
    """Both answers, in random order."""


class FeedbackBody(BaseModel):
    """Body of `/v1/feedback`; which fields it has depends on its kind."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    kind: Literal["choice", "thumb", "ranking", "correction"]
    id: Id
    """Id of what it is about: of a comparison or a group of answers (choice, ranking), or of one answer (thumb,
    correction)."""
    winner: Id | None = None
    """Of a choice: id of the better answer, `tie` or `both_bad`."""
    up: bool | None = None
    """Of a thumb: whether the answer is good."""
    order: Annotated[list[Id], Field(min_length=2, max_length=100)] | None = None
    """Of a ranking: ids of all answers, the best first."""
    text: Annotated[str, Field(min_length=1, max_length=100_000)] | None = None
    """Of a correction: what the answer should have been."""
    comment: Annotated[str, Field(max_length=2000)] | None = None
    """What the person says about it; it is stored with the feedback, and not trained on."""

    @model_validator(mode="after")
    def _what_its_kind_needs(self) -> Self:
        fields = {"choice": "winner", "thumb": "up", "ranking": "order", "correction": "text"}
        for kind, field in fields.items():
            if (getattr(self, field) is not None) != (kind == self.kind):
                raise ValueError(f"a {self.kind} has the field {fields[self.kind]}, and none of the other kinds'")
        return self

    @property
    def verdict(self) -> Verdict:
        """The same as a record of the store."""
        if self.winner is not None:
            return Choice(winner=self.winner)
        if self.up is not None:
            return Thumb(up=self.up)
        if self.order is not None:
            return Ranking(order=tuple(self.order))
        assert self.text is not None
        return Correction(text=self.text)


class FeedbackReceipt(ResponseModel):
    """Answer of `/v1/feedback`: the proof that the feedback is on the disk."""

    id: str
    kind: FeedbackKind
    target: str
    """Id of the group or answer that it is about."""
    created: int
    """UTC, Unix seconds."""
    replaces: str | None
    """Id of the same person's earlier feedback that this one replaces."""
    note: str | None
    """Why nothing can be learned from it; null if something can."""
    object: Literal["feedback"]


class DeletedRecords(ResponseModel):
    """Answer of `DELETE /v1/records/{id}`."""

    deleted: int
    """How many groups, answers and pieces of feedback were deleted."""


class TrainingRows(StreamingResponse):
    """Training rows as JSON lines."""

    media_type = "application/x-ndjson"


@dataclass(frozen=True, kw_only=True)
class EngineAnswer:
    """One answer of the engine."""

    text: str
    version: int
    """Number of the model version that gave it."""
    finish_reason: str | None

    @classmethod
    def from_reply(cls, reply: dict[str, Any], version: int) -> EngineAnswer:
        """Reads the first choice of a chat completion or a text completion."""
        choice = reply["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        return cls(text=text or "", version=version, finish_reason=choice["finish_reason"])


@router.post("/v1/comparisons", tags=["labeller"], response_model=Comparison)
async def comparisons(request: Request, body: ComparisonBody, context: Context) -> Response:
    """Returns two answers to one prompt in random order, for a person to choose between."""
    if not context.config.feedback.record:
        message = "This service keeps no texts (feedback.record is off), so nobody could learn from it."
        raise RequestError(409, message, code="not_recorded")
    model = _compared_model(request, body, context)
    engine_request = _comparison_request(request, body, model)
    is_named = body.versions is not None

    async def generate() -> list[EngineAnswer]:
        versions = compared_versions(body, model)
        return await asyncio.gather(
            *(_answer(context, model, engine_request, version, is_named=is_named) for version in versions)
        )

    engine_answers = await comparable_answers(generate)
    id = f"cmp-{context.ids.issue()}"
    answers = [
        RecordedAnswer(
            id=f"{id}-{index}",
            text=answer.text,
            version=answer.version,
            model=model.served_model.name,
            finish_reason=answer.finish_reason,
        )
        for index, answer in enumerate(engine_answers)
    ]
    record = GenerationRecord(
        id=id,
        kind="comparison",
        prompt=prompt_of(engine_request),
        answers=tuple(answers),
        asked_by=key_of(request).name,
        created=time.time(),
        recorded=True,
    )
    await wait_for_store(context.store.record(record))
    shown_answers = random.sample(answers, 2)
    items = [{"id": answer.id, "text": answer.text} for answer in shown_answers]
    return JSONResponse({"id": id, "object": "comparison", "answers": items})


def _compared_model(request: Request, body: ComparisonBody, context: IngressContext) -> ModelContext:
    """Returns the model whose versions are compared.

    Raises:
        RequestError: 404, there is no such model; 400, there are several, and none is named.
    """
    if body.model is not None and body.model not in context.models:
        raise RequestError(404, f"Versions of {' and '.join(context.models)} are compared here.")
    return choose_model(body.model, request, context)


def _comparison_request(request: Request, body: ComparisonBody, model: ModelContext) -> dict[str, Any]:
    """Returns what the engine is asked for both answers.

    Raises:
        RequestError: 400, no training row could hold the prompt.
    """
    messages = parsed_body(request).get("messages")
    prompt = {"prompt": body.prompt} if body.messages is None else {"messages": to_engine_messages(messages or ())}
    if reason := unrecordable_reason(prompt):
        raise RequestError(400, f"Nobody could learn from this comparison: {reason}.")
    temperature = TEMPERATURE if body.temperature is None else body.temperature
    # Null leaves the limit to the engine. Without the field, a text completion would have OpenAI's 16 tokens.
    limit = None if body.max_tokens is None else min(body.max_tokens, model.config.limits.max_tokens)
    return {**prompt, "model": model.served_model.name, "max_tokens": limit, "temperature": temperature}


def compared_versions(body: ComparisonBody, model: ModelContext) -> tuple[int | None, int | None]:
    """Returns the versions that answer: those of the request; else the current one and the canary; else None twice.

    None is whichever version answers at the moment, also during a promotion.
    """
    if body.versions is not None:
        return body.versions[0], body.versions[1]
    state = model.registry.state()
    return (None, None) if state.canary is None else (state.current, state.canary)


async def _answer(
    context: IngressContext,
    model: ModelContext,
    engine_request: dict[str, Any],
    version: int | None,
    *,
    is_named: bool,
) -> EngineAnswer:
    """Returns one answer.

    Args:
        is_named: whether the client named the version, so that no other may answer in its place.

    Raises:
        RequestError: the engine's own error.
    """
    seed, request_id = random.getrandbits(62), context.ids.issue()
    sampled_request = {**engine_request, "seed": seed, "request_id": request_id}
    route: Route = "chat" if "messages" in engine_request else "completions"
    reply = await single_reply(model.backend.ask(route, sampled_request, version))
    if reply.status == 409 and not is_named:  # the version has changed, or the canary has ended
        reply = await single_reply(model.backend.ask(route, sampled_request))
    if reply.status != 200:
        raise RequestError.from_reply(reply)
    content = json.loads(reply.body)
    context.metrics.count_tokens(reply.version, content.get("usage"), model=model.id)
    return EngineAnswer.from_reply(content, version_number(reply.version))


@router.post("/v1/feedback", tags=["labeller"], response_model=FeedbackReceipt)
async def feedback(
    request: Request,
    body: FeedbackBody,
    context: Context,
    idempotency_key: Annotated[str | None, Header(max_length=200, pattern=r"^[\x20-\x7e]+$")] = None,
) -> Response:
    """Stores what a person says about an answer. It answers when the feedback is on the disk."""
    record = Feedback(
        target=body.id,
        verdict=body.verdict,
        labeller=key_of(request).name,
        comment=body.comment,
        key=idempotency_key,
    )
    receipt = await wait_for_store(
        context.store.record_feedback(record), explain_absence=lambda: _explain_absence(context, body.id)
    )
    context.metrics.count_feedback(body.kind)
    return JSONResponse(asdict(receipt) | {"object": "feedback", "created": int(receipt.created)})


def _explain_absence(context: IngressContext, id: str) -> RequestError | None:
    """Returns why the store does not know an answer that this endpoint issued; None for any other id."""
    age_s = context.ids.age_s(id)
    if age_s is None:
        return None
    if context.recorder.was_cut_off(id):
        return RequestError(404, "The answer was cut off before its end, so it is not stored.")
    if context.recorder.is_pending(id, age_s):
        message = "The answer is not stored yet. Send this again."
        return RequestError(503, message, code="not_stored_yet", retry_after_s=RETRY_S)
    return RequestError(404, "The answer is not stored: it was cut off before its end, or deleted later.")


@router.get("/v1/feedback/export", tags=["admin"], response_class=TrainingRows, responses=ERRORS_BESIDE_TEXT)
async def export(
    context: Context,
    after_id: Annotated[str | None, Query(alias="since", max_length=200)] = None,
    limit: Annotated[int | None, Query(ge=1, le=10**6)] = None,
    model: RecordedModel = None,
) -> Response:
    """Returns training rows as JSON lines, which `raylign train` reads.

    Where the endpoint has several models, each row says by its `model` which of them answered.
    """
    if model is not None:
        find_answering(model, context)
    names_model = len(context.models) > 1
    query = partial(context.store.export, after_id=after_id, limit=limit, model=model, names_model=names_model)
    return TrainingRows(await read_store(query))


@router.get("/v1/feedback/statistics", tags=["labeller"], response_model=Statistics)
async def statistics(request: Request, context: Context, model: RecordedModel = None) -> Response:
    """Returns how much feedback there is, and how far people agree. Of several models, one has to be named."""
    if model is not None:
        find_answering(model, context)
    elif len(context.models) > 1:
        choose_model(None, request, context)  # versions of several models have the same numbers
    return JSONResponse(asdict(await read_store(partial(context.store.statistics, model=model))))


@router.delete("/v1/records/{id}", tags=["admin"], response_model=DeletedRecords)
async def delete(id: Annotated[str, Field(max_length=200)], context: Context) -> Response:
    """Deletes an answer, a comparison or a piece of feedback, and everything that belongs to it."""
    was_pending = await asyncio.to_thread(context.recorder.discard, id)
    try:
        return JSONResponse({"deleted": await wait_for_store(context.store.delete(id)) + was_pending})
    except RequestError:
        if not was_pending:
            raise
        return JSONResponse({"deleted": 1})


async def comparable_answers(generate: Callable[[], Awaitable[list[EngineAnswer]]]) -> list[EngineAnswer]:
    """Returns two answers whose comparison can become a training pair: neither is blank, and they differ.

    Args:
        generate: returns two answers. After `ATTEMPTS` calls, its last answers are returned as they are.
    """
    for _ in range(ATTEMPTS):
        answers = await generate()
        texts = {answer.text for answer in answers}
        if len(texts) == 2 and all(text.strip() for text in texts):
            break
    return answers


async def wait_for_store(
    future: Future[Stored], *, explain_absence: Callable[[], RequestError | None] = lambda: None
) -> Stored:
    """Returns what the store returns when everything is on the disk.

    Args:
        explain_absence: returns why the store does not know an id; None if the id was never issued.

    Raises:
        RequestError: nothing of this is stored, and why.
    """
    try:
        return await asyncio.wrap_future(future)
    except UnknownIndex as error:
        raise _request_error(error) from error
    except UnknownId as error:
        raise (await asyncio.to_thread(explain_absence) or _request_error(error)) from error
    except StoreError as error:
        raise _request_error(error) from error


async def read_store(query: Callable[[], Stored]) -> Stored:
    """Returns what a query of the store returns; the query runs in a thread.

    Raises:
        RequestError: the store cannot answer, and why.
    """
    try:
        return await asyncio.to_thread(query)
    except StoreError as error:
        raise _request_error(error) from error


def _request_error(error: StoreError) -> RequestError:
    status = STATUS.get(type(error), 500)
    return RequestError(status, f"{error}.", retry_after_s=RETRY_S if status == 503 else None)
