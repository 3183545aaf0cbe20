"""OpenAI's routes: completions of chats and texts, models, tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from alignment.settings.model import is_template_variable
from serving.fields import taken
from serving.grammar import check_structured_output
from serving.guard import as_response
from serving.issuing import Kind, Transcript, issued
from serving.routes import VERSION_HEADER, ReadRoute, Service, key_of, spend_form_seconds, wanted_version
from serving.schema import Refused, Reply, Route, event

END = "data: [DONE]\n\n"
"""The event that ends a stream."""
USAGE = '"choices":[],'
"""In the one event of a stream that counts its tokens. In a text of the answer, the quotation marks are escaped."""
BROKEN = {"timeout": "deadline", "service_unavailable": "replica"}
"""Why a stream broke off, by the code of its error; any other is the engine's."""

logger = logging.getLogger("ray.serve")

Parts = AsyncGenerator[Reply | str]
Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
# A list is wrong with its first wrong member: telling of 100,000 takes seconds, in which nobody else is answered.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
TemplateKey = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)]
TemplateValue = bool | int | float | Annotated[str, Field(max_length=1000)] | None
TemplateValues = Annotated[dict[TemplateKey, TemplateValue], Field(max_length=16)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class Asking(BaseModel):
    """What both kinds of completions take; `serving.fields` says which other fields there are."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str = Field(max_length=200)
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(max_length=1000)] | Annotated[list[StopText], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    user: Annotated[str, Field(max_length=200)] | None = None


class Part(BaseModel):
    """A part of a message; there are only texts, and what an assistant would not say, in OpenAI's form."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    cache_control: Any = None
    """Anthropic's way to say what is worth keeping in a cache; everything is."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, part: Any) -> Any:
        if isinstance(part, dict) and part.get("type") not in ("text", "refusal"):
            raise PydanticCustomError("no_text", "There are only texts here: a part has the type text or refusal")
        if isinstance(part, dict) and part.get(part["type"]) is None:
            raise PydanticCustomError("missing", "A part has a text under the name that is its type")
        return part


class CalledFunction(BaseModel):
    """A function and what it was called with: JSON, as a text or not."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(BaseModel):
    """A call of a tool in an answer."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"] = "function"
    function: CalledFunction


class Function(BaseModel):
    """A function that a model may call; vLLM knows the other fields."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str


class Tool(BaseModel):
    """A tool that a model may call. vLLM looks into tools and calls before it knows that they are any."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"] = "function"
    function: Function


class ChatTurn(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Annotated[str, Field(pattern="^(system|developer|user|assistant|tool|function)$")]
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None


Messages = Annotated[list[ChatTurn], Field(min_length=1, max_length=1000, fail_fast=True)]


class ChatBody(Asking):
    """Body of `/v1/chat/completions`."""

    messages: Messages
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    chat_template_kwargs: TemplateValues | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None


class CompletionBody(Asking):
    """Body of `/v1/completions`."""

    prompt: (
        str
        | TokenIds
        | Annotated[
            Annotated[list[str], Field(fail_fast=True)] | Annotated[list[TokenIds], Field(fail_fast=True)],
            Field(min_length=1),
        ]
    )
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None


class TokenizeBody(BaseModel):
    """Body of `/tokenize`: a text or a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(max_length=200)
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: TemplateValues | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None


class DetokenizeBody(BaseModel):
    """Body of `/detokenize`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(max_length=200)
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]


def routes(service: Service) -> APIRouter:
    """The router of this module."""
    router = APIRouter(route_class=ReadRoute)
    cards = _cards(service)
    config = service.config

    @router.get("/v1/models", tags=["user"])
    async def models() -> Response:
        """Every model that can be asked for."""
        window = await service.backend.max_model_len()
        return JSONResponse({"object": "list", "data": [{**each, "max_model_len": window} for each in cards.values()]})

    @router.get("/v1/models/{name:path}", tags=["user"])
    async def model(name: str) -> Response:
        """One of them."""
        return JSONResponse({**card(name), "max_model_len": await service.backend.max_model_len()})

    @router.post("/v1/chat/completions", tags=["user"])
    async def chat(request: Request, body: ChatBody) -> Response:
        """OpenAI's chat completions."""
        _check_limit("top_logprobs", body.top_logprobs, config.limits.max_logprobs)
        asked = checked(request, body)
        _check_template_values(body)
        _check_tools(asked, service.served.tool_call_parser)
        _check_limit("max_completion_tokens", body.max_completion_tokens, config.limits.max_tokens)
        return await answered("chat", request, asked)

    @router.post("/v1/completions", tags=["user"])
    async def completions(request: Request, body: CompletionBody) -> Response:
        """OpenAI's completions."""
        _check_limit("logprobs", body.logprobs, config.limits.max_logprobs)
        if body.max_tokens == 0 and not body.echo:
            message = "max_tokens is 0, so that there would be no answer; with echo, the prompt itself is one."
            raise Refused(400, message, code="integer_below_min_value", param="max_tokens")
        if (prompts := num_prompts(body.prompt)) > 1:
            _check_limit("the number of answers to all prompts", prompts * (body.n or 1), config.limits.max_prompts)
        return await answered("completions", request, checked(request, body))

    @router.post("/tokenize", tags=["user"])
    async def tokenize(request: Request, body: TokenizeBody) -> Response:
        """Token ids of a text or a chat."""
        if (body.prompt is None) == (body.messages is None):
            raise Refused(400, "Give either prompt or messages.")
        card(body.model)
        _check_template_values(body)
        return await tokens("tokenize", request)

    @router.post("/detokenize", tags=["user"])
    async def detokenize(request: Request, body: DetokenizeBody) -> Response:
        """The text of token ids."""
        card(body.model)
        return await tokens("detokenize", request)

    async def tokens(route: Route, request: Request) -> Response:
        asked = taken(route, request.scope["state"]["json"])
        return as_response(await whole(service.backend.ask(route, asked, wanted_version(request))))

    def card(name: str) -> dict[str, Any]:
        if name not in cards:
            message = f"There is no model {name[:100]!r} here; there are {', '.join(cards)}."
            raise Refused(404, message, code="model_not_found", param="model")
        return cards[name]

    def checked(request: Request, body: Asking) -> dict[str, Any]:
        """What was sent, if it keeps to the limits."""
        card(body.model)
        asked = taken("chat" if isinstance(body, ChatBody) else "completions", request.scope["state"]["json"])
        _check_limit("n", body.n, config.limits.max_n)
        _check_limit("max_tokens", body.max_tokens, config.limits.max_tokens)
        check_structured_output(asked, config.limits)
        return asked | {"request_id": service.ids.fresh()}  # without it, Ray takes the client's header X-Request-ID

    async def answered(route: Route, request: Request, asked: dict[str, Any]) -> Response:
        started = time.perf_counter()
        sent = with_usage(asked)
        parts = service.backend.ask(route, sent, wanted_version(request))
        first = await anext(parts)
        assert isinstance(first, Reply), "as Backend.ask says"
        service.meters.took("version", first.version_s)
        if first.form_s:
            service.meters.took("form", first.form_s)
        if first.form_problem is not None:
            service.meters.form_refused(first.form_problem)
        spend_form_seconds(request, first.form_s)
        if first.body:
            await parts.aclose()
            if first.status == 200:
                said = Transcript(asked, recorded=config.feedback.record)
                said.read(f"data: {first.body}")
                remember(route, request, asked, said, first.version)
            return as_response(first)
        headers = {VERSION_HEADER: first.version or ""}
        stream = streamed(route, request, asked, first, parts, started, hides_usage=sent is not asked)
        return StreamingResponse(stream, headers=headers, media_type="text/event-stream")

    async def streamed(
        route: Route,
        request: Request,
        asked: dict[str, Any],
        begun: Reply,
        parts: Parts,
        started: float,
        *,
        hides_usage: bool,
    ) -> AsyncIterator[str]:
        said, is_first, has_ended = Transcript(asked, recorded=config.feedback.record), True, False
        async for text in texts(begun, parts):
            if is_first:
                service.meters.first_token(request.scope["route"].path, begun.version, time.perf_counter() - started)
                is_first = False
            said.read(text)
            if text.endswith(END):  # which no answer's text can, since line breaks in it are escaped
                has_ended = True
                # Before the client sees the end, so that its judgement cannot come too early.
                remember(route, request, asked, said, begun.version)
            if hides_usage and USAGE in text:
                text = without_usage(text)
            if text:
                yield text
        if said.error is not None or not has_ended:
            request.scope["state"]["broken"] = BROKEN.get(said.error or "", "engine")

    def remember(route: Route, request: Request, asked: dict[str, Any], said: Transcript, version: str | None) -> None:
        """Has the store keep what was answered; nobody waits for it, and no answer is lost because it fails."""
        begun = time.perf_counter()
        kind: Kind = "chat" if route == "chat" else "completion"
        try:
            service.meters.generated(version, said.usage)
            if answer := issued(kind, asked, said, version=version, asked_by=key_of(request).name):
                service.recorder.record(answer)
        except Exception as error:  # not its text, which may quote the answer
            logger.error("An answer was given and could not be kept: %s", type(error).__name__)
            service.meters.record_lost("not read")
        service.meters.took("record", time.perf_counter() - begun)

    return router


async def texts(begun: Reply, parts: Parts) -> AsyncIterator[str]:
    """The events of a stream; the first came with its beginning."""
    if begun.events:
        yield begun.events
    async for part in parts:
        yield event(part) if isinstance(part, Reply) else part


def with_usage(asked: dict[str, Any]) -> dict[str, Any]:
    """The same request, with a stream that ends by counting its tokens: we want to know them, whoever asks."""
    options = asked.get("stream_options")
    may_be_set = options is None or (isinstance(options, dict) and not options.get("include_usage"))
    if asked.get("stream") is not True or not may_be_set:
        return asked
    return asked | {"stream_options": {**(options or {}), "include_usage": True, "continuous_usage_stats": False}}


def without_usage(events: str) -> str:
    """Events of a stream but the one that counts its tokens."""
    return "\n\n".join(each for each in events.split("\n\n") if USAGE not in each)


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


def _check_template_values(body: ChatBody | TokenizeBody) -> None:
    for name in body.chat_template_kwargs or {}:
        if not is_template_variable(name):
            raise Refused(400, f"chat_template_kwargs cannot set {name}: it holds what the model's template reads.")


def _check_tools(asked: dict[str, Any], parser: str | None) -> None:
    """Refuses tools for which vLLM would want flags of its own command line."""
    if asked.get("tools") and asked.get("tool_choice", "auto") != "none" and parser is None:
        raise Refused(
            400,
            "The form in which this model writes calls of tools is not known (tool_call_parser names it at the start); "
            "leave tools out, or set tool_choice to none.",
            code="unsupported_parameter",
            param="tools",
        )


def _check_limit(name: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        message = f"{name} is {value}, and at most {limit} here."
        raise Refused(400, message, code="integer_above_max_value", param=name if " " not in name else None)


def _cards(service: Service) -> dict[str, dict[str, Any]]:
    created, served = int(time.time()), service.served
    parents = {served.name: served.base_name} if served.base_name else {}
    return {
        name: {"id": name, "object": "model", "created": created, "owned_by": "raylign", "parent": parents.get(name)}
        for name in served.names
    }
