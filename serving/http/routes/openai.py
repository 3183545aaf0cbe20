"""OpenAI's routes: completions of chats and texts, models, tokens."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from alignment.settings.model import is_template_variable
from serving.feedback.transcript import GenerationKind, Transcript, generation_record
from serving.http.access import as_response
from serving.http.fields import to_engine_request
from serving.http.routes import (
    VERSION_HEADER,
    Context,
    IngressContext,
    ModelContext,
    ParsedBodyRoute,
    answering_model,
    key_of,
    parsed_body,
    requested_version,
    spend_form_seconds,
)
from serving.http.routes.bodies import (
    STREAM,
    ChatBody,
    ChatCompletion,
    CompletionBody,
    CompletionRequest,
    DetokenizeBody,
    DetokenizeReply,
    ModelCard,
    ModelList,
    TextCompletion,
    TokenizeBody,
    TokenizeReply,
)
from serving.registry.model_id import ModelId
from serving.replica.grammar import check_enforceable, check_structured_output
from serving.schema import Reply, RequestError, Route, event

END = "data: [DONE]\n\n"
"""The event that ends a stream."""
USAGE = '"choices":[],'
"""What stands only in the one event of a stream that counts its tokens: in an answer's text, quotation marks are
escaped."""
BREAK_REASONS = {"timeout": "deadline", "service_unavailable": "replica"}
"""Why a stream broke off, by the code of its error; any other error is the engine's."""

logger = logging.getLogger("ray.serve")

ReplyStream = AsyncGenerator[Reply | str]

router = APIRouter(route_class=ParsedBodyRoute)


@router.get("/v1/models", tags=["user"], response_model=ModelList)
async def models(context: Context) -> Response:
    """Lists the models that clients can ask for."""
    cards = model_cards(context)
    models = [context.models.answering(name) for name in cards]
    lengths = await asyncio.gather(*(model.backend.max_model_len() for model in models))
    data = [{**card, "max_model_len": length} for card, length in zip(cards.values(), lengths, strict=True)]
    return JSONResponse({"object": "list", "data": data})


@router.get("/v1/models/{name:path}", tags=["user"], response_model=ModelCard)
async def model(name: str, request: Request, context: Context) -> Response:
    """Describes one model."""
    backend = answering_model(name, request, context).backend
    return JSONResponse({**model_cards(context)[name], "max_model_len": await backend.max_model_len()})


@router.post("/v1/chat/completions", tags=["user"], response_model=ChatCompletion, responses=STREAM)
async def chat(request: Request, body: ChatBody, context: Context) -> Response:
    """Answers a chat, as OpenAI's chat completions."""
    limits = context.config.limits
    _check_limit("top_logprobs", body.top_logprobs, limits.max_logprobs)
    model = answering_model(body.model, request, context)
    engine_request = _completion_request("chat", request, body, context)
    _check_template_values(body)
    _check_tools(engine_request, model.served_model.tool_call_parser)
    _check_limit("max_completion_tokens", body.max_completion_tokens, limits.max_tokens)
    return await _complete("chat", request, engine_request, model, context)


@router.post("/v1/completions", tags=["user"], response_model=TextCompletion, responses=STREAM)
async def completions(request: Request, body: CompletionBody, context: Context) -> Response:
    """Continues texts, as OpenAI's completions."""
    limits = context.config.limits
    _check_limit("logprobs", body.logprobs, limits.max_logprobs)
    if body.max_tokens == 0 and not body.echo:
        message = "max_tokens is 0, so that there would be no answer; with echo, the prompt itself is one."
        raise RequestError(400, message, code="integer_below_min_value", param="max_tokens")
    if (prompts := num_prompts(body.prompt)) > 1:
        _check_limit("the number of answers to all prompts", prompts * (body.n or 1), limits.max_prompts)
    model = answering_model(body.model, request, context)
    engine_request = _completion_request("completions", request, body, context)
    return await _complete("completions", request, engine_request, model, context)


@router.post("/tokenize", tags=["user"], response_model=TokenizeReply)
async def tokenize(request: Request, body: TokenizeBody, context: Context) -> Response:
    """Returns the token ids of a text or a chat."""
    if (body.prompt is None) == (body.messages is None):
        raise RequestError(400, "Give either prompt or messages.")
    model = answering_model(body.model, request, context)
    _check_template_values(body)
    return await _token_response("tokenize", request, model)


@router.post("/detokenize", tags=["user"], response_model=DetokenizeReply)
async def detokenize(request: Request, body: DetokenizeBody, context: Context) -> Response:
    """Returns the text of token ids."""
    model = answering_model(body.model, request, context)
    return await _token_response("detokenize", request, model)


def model_cards(context: IngressContext) -> dict[str, dict[str, Any]]:
    """Returns the models by their names, as OpenAI describes them; a replica knows their length."""
    parents = {name: model.served_model.base_name for name, model in context.models.items()}
    common = {"object": "model", "created": context.started_at, "owned_by": "raylign"}
    return {name: {"id": name, **common, "parent": parents.get(ModelId(name))} for name in context.models.names}


async def _token_response(route: Route, request: Request, model: ModelContext) -> Response:
    """Returns the engine's answer to a question about tokens."""
    engine_request = to_engine_request(route, parsed_body(request))
    replies = model.backend.ask(route, engine_request, requested_version(request))
    return as_response(await single_reply(replies))


def _completion_request(
    route: Route, request: Request, body: CompletionRequest, context: IngressContext
) -> dict[str, Any]:
    """Returns a request as the engine needs it.

    Raises:
        RequestError: 400, a field is not known, or asks for more than the limits allow.
    """
    limits = context.config.limits
    engine_request = to_engine_request(route, parsed_body(request))
    _check_limit("n", body.n, limits.max_n)
    _check_limit("max_tokens", body.max_tokens, limits.max_tokens)
    check_structured_output(engine_request, limits)
    check_enforceable(engine_request)
    # Without this id, Ray would take the client's header X-Request-ID.
    return engine_request | {"request_id": context.ids.issue()}


async def _complete(
    route: Route, request: Request, engine_request: dict[str, Any], model: ModelContext, context: IngressContext
) -> Response:
    """Has the engine answer, and has the answer recorded: a whole answer, or a stream."""
    start = time.perf_counter()
    counted_request = with_usage(engine_request)
    replies = model.backend.ask(route, counted_request, requested_version(request))
    first_reply = await anext(replies)
    assert isinstance(first_reply, Reply), "as Backend.ask promises"
    _observe_form(request, first_reply, context)
    if first_reply.body:
        await replies.aclose()
        if first_reply.status == 200:
            transcript = Transcript(engine_request, keeps_texts=context.config.feedback.record)
            transcript.add_events(f"data: {first_reply.body}")
            _record(route, request, engine_request, transcript, first_reply.version, context)
        return as_response(first_reply)
    stream = _Stream(
        context=context,
        request=request,
        route=route,
        engine_request=engine_request,
        first_reply=first_reply,
        start=start,
        hides_usage=counted_request is not engine_request,
    )
    headers = {VERSION_HEADER: first_reply.version or ""}
    return StreamingResponse(stream.events(replies), headers=headers, media_type="text/event-stream")


def _observe_form(request: Request, reply: Reply, context: IngressContext) -> None:
    """Counts what a replica did before it answered: it chose a version, and it compiled the answer's form."""
    context.metrics.observe("version", reply.version_s)
    if reply.form_s:
        context.metrics.observe("form", reply.form_s)
    if reply.form_problem is not None:
        context.metrics.count_refused_form(reply.form_problem)
    spend_form_seconds(request, reply.form_s)


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """A streamed answer on its way to the client."""

    context: IngressContext
    request: Request
    route: Route
    engine_request: dict[str, Any]
    first_reply: Reply
    start: float
    """When the request came to the route: seconds of `time.perf_counter`."""
    hides_usage: bool
    """Whether the client did not ask for the event that counts the tokens."""

    async def events(self, replies: ReplyStream) -> AsyncIterator[str]:
        """Passes events on as they come, and has the answer recorded before the client sees its end."""
        context, version = self.context, self.first_reply.version
        transcript = Transcript(self.engine_request, keeps_texts=context.config.feedback.record)
        is_first, has_ended = True, False
        try:
            async for text in stream_texts(self.first_reply, replies):
                if is_first:
                    path = self.request.scope["route"].path
                    model = self.request.scope["state"].get("model")
                    context.metrics.observe_first_token(path, version, time.perf_counter() - self.start, model=model)
                    is_first = False
                transcript.add_events(text)
                if text.endswith(END):  # no answer's text can end so, since line breaks in it are escaped
                    has_ended = True
                    # Before the client sees the end, so that feedback on the answer cannot come too early.
                    _record(self.route, self.request, self.engine_request, transcript, version, context)
                if self.hides_usage and USAGE in text:
                    text = without_usage(text)
                if text:
                    yield text
        finally:  # also when the client has gone away
            if not has_ended and transcript.id is not None:
                context.recorder.cut_off(transcript.id)
        if transcript.error is not None or not has_ended:
            self.request.scope["state"]["broken"] = BREAK_REASONS.get(transcript.error or "", "engine")


def _record(
    route: Route,
    request: Request,
    engine_request: dict[str, Any],
    transcript: Transcript,
    version: str | None,
    context: IngressContext,
) -> None:
    """Has an answer recorded. Nobody waits for it, and no answer is lost if it fails."""
    start = time.perf_counter()
    kind: GenerationKind = "chat" if route == "chat" else "completion"
    try:
        context.metrics.count_tokens(version, transcript.usage, model=request.scope["state"].get("model"))
        asked_by = key_of(request).name
        if record := generation_record(kind, engine_request, transcript, version=version, asked_by=asked_by):
            context.recorder.record(record)
    except Exception as error:  # its text is not logged, since it may quote the answer
        logger.error("An answer was given and could not be kept: %s", type(error).__name__)
        context.metrics.count_lost_record("not read")
    context.metrics.observe("record", time.perf_counter() - start)


async def stream_texts(first_reply: Reply, replies: ReplyStream) -> AsyncIterator[str]:
    """Yields the events of a stream as text; the first events come with the first reply."""
    if first_reply.events:
        yield first_reply.events
    async for reply in replies:
        yield event(reply) if isinstance(reply, Reply) else reply


def with_usage(engine_request: dict[str, Any]) -> dict[str, Any]:
    """Returns the same request; if it asks for a stream, one that ends with the number of its tokens.

    The endpoint's metrics need the number, whether or not the client asks for it.
    """
    options = engine_request.get("stream_options")
    may_be_set = options is None or (isinstance(options, dict) and not options.get("include_usage"))
    if engine_request.get("stream") is not True or not may_be_set:
        return engine_request
    usage_options = {**(options or {}), "include_usage": True, "continuous_usage_stats": False}
    return engine_request | {"stream_options": usage_options}


def without_usage(events: str) -> str:
    """Returns the events of a stream without the one that counts its tokens."""
    return "\n\n".join(text for text in events.split("\n\n") if USAGE not in text)


async def single_reply(replies: ReplyStream) -> Reply:
    """Returns the one reply to a request that asks for no stream."""
    try:
        reply = await anext(replies)
        assert isinstance(reply, Reply), "as Backend.ask promises"
        return reply
    finally:
        await replies.aclose()


def num_prompts(prompt: str | list[Any]) -> int:
    """Returns how many prompts a request to `/v1/completions` holds; each gets answers of its own."""
    is_single = isinstance(prompt, str) or isinstance(prompt[0], int)
    return 1 if is_single else len(prompt)


def _check_template_values(body: ChatBody | TokenizeBody) -> None:
    """Refuses values for the template that stand for a chat itself, as its messages."""
    for name in body.chat_template_kwargs or {}:
        if not is_template_variable(name):
            raise RequestError(
                400, f"chat_template_kwargs cannot set {name}: it holds what the model's template reads."
            )


def _check_tools(engine_request: dict[str, Any], parser: str | None) -> None:
    """Refuses tools whose calls vLLM could not read, as its own command line does without its flags for tools."""
    if engine_request.get("tools") and engine_request.get("tool_choice", "auto") != "none" and parser is None:
        raise RequestError(
            400,
            "The form in which this model writes calls of tools is not known (tool_call_parser names it at the start); "
            "leave tools out, or set tool_choice to none.",
            code="unsupported_parameter",
            param="tools",
        )


def _check_limit(name: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        message = f"{name} is {value}, and at most {limit} here."
        raise RequestError(400, message, code="integer_above_max_value", param=name if " " not in name else None)
