"""OpenAI's routes: completions of chats and texts, models, tokens."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from alignment.config import is_template_variable
from serving.grammar import check_structured_output
from serving.guard import as_response
from serving.issuing import Kind, chunks, issued
from serving.routes import VERSION_HEADER, Service, key_of, spend_form_seconds, wanted_version
from serving.schema import Refused, Reply, Route, event

REFUSED_FIELDS = {
    "chat_template": "templates come with the model",
    "request_id": "the service issues the ids",
    "prompt_embeds": "prompts are texts or tokens",
    "prompt_logprobs": "POST /v1/rewards rates what is given",
    "use_beam_search": "answers are sampled",
    "best_of": "ask for n answers",
    "priority": "all requests wait in turn",
    "cache_salt": "the cache is the service's own",
    "kv_transfer_params": "the cache is the service's own",
    "vllm_xargs": "only documented fields are passed on",
    "mm_processor_kwargs": "there are only texts",
    "media_io_kwargs": "there are only texts",
}
"""Fields that vLLM reads and clients have no business with, and why."""

END = "data: [DONE]"
"""The line that ends a stream."""

logger = logging.getLogger("ray.serve")

Parts = AsyncGenerator[Reply | str]
Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
TemplateKey = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)]
TemplateValue = bool | int | float | Annotated[str, Field(max_length=1000)] | None
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Asking(BaseModel):
    """What both kinds of completions take; other fields of OpenAI's and vLLM's are passed on."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str = Field(max_length=200)
    max_tokens: Tokens | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1000)]
        | list[Annotated[str, Field(min_length=1, max_length=1000)]]
        | None
    ) = None
    stream: bool | None = None
    user: Annotated[str, Field(max_length=200)] | None = None


class TextPart(BaseModel):
    """A part of a message; there are only texts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Annotated[str, Field(pattern="^text$")]
    text: str


class ChatTurn(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Annotated[str, Field(pattern="^(system|developer|user|assistant|tool)$")]
    content: str | list[TextPart] | None = None


class ChatBody(Asking):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatTurn], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Tokens | None = None
    chat_template_kwargs: Annotated[dict[TemplateKey, TemplateValue], Field(max_length=16)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None


class CompletionBody(Asking):
    """Body of `/v1/completions`."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None


class TokenizeBody(BaseModel):
    """Body of `/tokenize`: a text or a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(max_length=200)
    prompt: str | None = None
    messages: Annotated[list[ChatTurn], Field(min_length=1, max_length=1000)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


def routes(service: Service) -> APIRouter:
    """The router of this module."""
    router = APIRouter()
    cards = _cards(service)
    config = service.config

    @router.get("/v1/models", tags=["user"])
    async def models() -> Response:
        """Every model that can be asked for."""
        return JSONResponse({"object": "list", "data": list(cards.values())})

    @router.get("/v1/models/{name:path}", tags=["user"])
    async def model(name: str) -> Response:
        """One of them."""
        return JSONResponse(card(name))

    @router.post("/v1/chat/completions", tags=["user"])
    async def chat(request: Request, body: ChatBody) -> Response:
        """OpenAI's chat completions."""
        _check_limit("top_logprobs", body.top_logprobs, config.limits.max_logprobs)
        asked = checked(request, body)
        _check_template_values(body)
        _check_tools(asked, config.tool_call_parser)
        _check_limit("max_completion_tokens", body.max_completion_tokens, config.limits.max_tokens)
        return await answered("chat", request, asked)

    @router.post("/v1/completions", tags=["user"])
    async def completions(request: Request, body: CompletionBody) -> Response:
        """OpenAI's completions."""
        _check_limit("logprobs", body.logprobs, config.limits.max_logprobs)
        if (prompts := num_prompts(body.prompt)) > 1:
            _check_limit("the number of answers to all prompts", prompts * (body.n or 1), config.limits.max_prompts)
        return await answered("completions", request, checked(request, body))

    @router.post("/tokenize", tags=["user"])
    async def tokenize(request: Request, body: TokenizeBody) -> Response:
        """Token ids of a text or a chat."""
        if (body.prompt is None) == (body.messages is None):
            raise Refused(400, "Give either prompt or messages.")
        card(body.model)
        parts = service.backend.ask("tokenize", request.scope["state"]["json"], wanted_version(request))
        return as_response(await whole(parts))

    def card(name: str) -> dict[str, Any]:
        if name not in cards:
            raise Refused(404, f"There is no model {name[:100]!r} here; there are {', '.join(cards)}.")
        return cards[name]

    def checked(request: Request, body: Asking) -> dict[str, Any]:
        """What was sent, if it keeps to the limits."""
        card(body.model)
        asked: dict[str, Any] = dict(request.scope["state"]["json"])
        for name in asked.keys() & REFUSED_FIELDS.keys():
            raise Refused(400, f"The field {name} is not taken: {REFUSED_FIELDS[name]}.")
        _check_limit("n", body.n, config.limits.max_n)
        _check_limit("max_tokens", body.max_tokens, config.limits.max_tokens)
        check_structured_output(asked, config.limits)
        return asked | fresh_id()

    async def answered(route: Route, request: Request, asked: dict[str, Any]) -> Response:
        started = time.perf_counter()
        parts = service.backend.ask(route, asked, wanted_version(request))
        first = await anext(parts)
        assert isinstance(first, Reply), "as Backend.ask says"
        service.meters.took("version", first.version_s)
        spend_form_seconds(request, first.form_s)
        if first.body:
            await parts.aclose()
            service.meters.answered(route, first, time.perf_counter() - started)
            if first.status == 200:
                remember(route, request, asked, lambda: [json.loads(first.body)], first.version)
            return as_response(first)
        headers = {VERSION_HEADER: first.version or ""}
        stream = streamed(route, request, asked, first, parts, started)
        return StreamingResponse(stream, headers=headers, media_type="text/event-stream")

    async def streamed(
        route: Route, request: Request, asked: dict[str, Any], begun: Reply, parts: Parts, started: float
    ) -> AsyncIterator[str]:
        kept: list[str] = []
        async for text in texts(begun, parts):
            if not kept:
                service.meters.first_token(route, begun, time.perf_counter() - started)
            kept.append(text)
            if END in text.split("\n"):  # as a line of its own: in an answer's text, line breaks are escaped
                # Before the client sees the end, so that its judgement cannot come too early.
                remember(route, request, asked, lambda: chunks(kept), begun.version)
            yield text
        service.meters.answered(route, begun, time.perf_counter() - started)

    def remember(
        route: Route,
        request: Request,
        asked: dict[str, Any],
        said: Callable[[], list[dict[str, Any]]],
        version: str | None,
    ) -> None:
        """Has the store keep what was answered; nobody waits for it, and no answer is lost because it fails."""
        begun = time.perf_counter()
        kind: Kind = "chat" if route == "chat" else "completion"
        asked_by, recorded = key_of(request).name, config.feedback.record
        try:
            if parts := said():
                service.store.record(issued(kind, asked, parts, version=version, asked_by=asked_by, recorded=recorded))
        except Exception as error:  # not its text, which may quote the answer
            logger.error("An answer was given and could not be kept: %s", type(error).__name__)
        service.meters.took("record", time.perf_counter() - begun)

    return router


def fresh_id() -> dict[str, str]:
    """The field from which vLLM makes an answer's id. Without it, Ray takes the client's header X-Request-ID."""
    return {"request_id": uuid.uuid4().hex}


async def texts(begun: Reply, parts: Parts) -> AsyncIterator[str]:
    """The events of a stream; the first came with its beginning."""
    if begun.events:
        yield begun.events
    async for part in parts:
        yield event(part) if isinstance(part, Reply) else part


async def whole(parts: Parts) -> Reply:
    """The one reply of a request that does not ask for a stream."""
    try:
        reply = await anext(parts)
        assert isinstance(reply, Reply), "as Backend.ask says"
        return reply
    finally:
        await parts.aclose()


def num_prompts(prompt: str | list[Any]) -> int:
    """How many prompts a request to `/v1/completions` holds, each of which gets answers of its own."""
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return 1 if is_one else len(prompt)


def _check_template_values(body: ChatBody) -> None:
    for name in body.chat_template_kwargs or {}:
        if not is_template_variable(name):
            raise Refused(400, f"chat_template_kwargs cannot set {name}: it holds what the model's template reads.")


def _check_tools(asked: dict[str, Any], parser: str | None) -> None:
    """Refuses a choice that vLLM could only answer with flags of its own command line."""
    if asked.get("tools") and asked.get("tool_choice", "auto") in (None, "auto") and parser is None:
        raise Refused(
            400,
            "This endpoint does not read calls of tools out of answers (it was started without tool_call_parser); "
            "leave tools out, or set tool_choice to none, required or one of them.",
        )


def _check_limit(name: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        raise Refused(400, f"{name} is {value}, and at most {limit} here.")


def _cards(service: Service) -> dict[str, dict[str, Any]]:
    created, served = int(time.time()), service.served
    parents = {served.name: served.base_name} if served.base_name else {}
    return {
        name: {"id": name, "object": "model", "created": created, "owned_by": "raylign", "parent": parents.get(name)}
        for name in served.names
    }
