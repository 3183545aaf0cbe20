"""The bodies of OpenAI's routes: what a request may hold, and what an answer holds.

A request's body is checked here as far as a wrong type could do harm. `serving.http.fields` knows which other fields
there are, and `serving.feedback.transcript` reads the answers, which are passed on as the engine wrote them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serving.http.routes import OpenResponseModel, ResponseModel

TokenLimit = Annotated[int, Field(ge=1, le=2**31 - 1)]
# Checking ends at the first wrong member: reporting 100,000 of them takes seconds, in which nobody else is answered.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
TemplateKey = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)]
TemplateValue = bool | int | float | Annotated[str, Field(max_length=1000)] | None
TemplateValues = Annotated[dict[TemplateKey, TemplateValue], Field(max_length=16)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class CompletionRequest(BaseModel):
    """The fields of both kinds of completions whose types are checked; `serving.http.fields` lists the other fields."""

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


class ContentPart(BaseModel):
    """A part of a message in OpenAI's form: a text, or an assistant's refusal. There are no images and no audio."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    cache_control: Any = None
    """Anthropic's mark of what a cache should keep. It changes nothing: the prefix cache keeps everything."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") not in ("text", "refusal"):
            raise PydanticCustomError("no_text", "There are only texts here: a part has the type text or refusal")
        if isinstance(value, dict) and value.get(value["type"]) is None:
            raise PydanticCustomError("missing", "A part has a text under the name that is its type")
        return value


class CalledFunction(BaseModel):
    """A function that a model called, and its arguments: an object, or its JSON as a text."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(BaseModel):
    """A call of a tool in an assistant's message."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"] = "function"
    function: CalledFunction


class Function(BaseModel):
    """A function that a model may call; vLLM checks the other fields."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str


class Tool(BaseModel):
    """A tool that a model may call. It is checked here, since vLLM reads tools before it checks their types."""

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
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None


Messages = Annotated[list[ChatTurn], Field(min_length=1, max_length=1000, fail_fast=True)]


class ChatBody(CompletionRequest):
    """Body of `/v1/chat/completions`."""

    messages: Messages
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    chat_template_kwargs: TemplateValues | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None


class CompletionBody(CompletionRequest):
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


class ModelCard(ResponseModel):
    """A model that clients can ask for."""

    id: str
    object: Literal["model"]
    created: int
    """When the endpoint started: UTC, Unix seconds."""
    owned_by: str
    parent: str | None
    """Name of the base model, where this one is an adapter on it."""
    max_model_len: int | None
    """Most tokens of prompt and answer together; null until a replica has started."""


class ModelList(ResponseModel):
    """Answer of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class Usage(OpenResponseModel):
    """Numbers of tokens of a request and of its answers."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = None


class AssistantMessage(OpenResponseModel):
    """The message that a model writes."""

    role: str
    content: str | None = None
    reasoning: str | None = None
    """The model's thoughts, where the endpoint tells them from the answer."""
    tool_calls: list[ToolCall] | None = None


class CompletionChoice(OpenResponseModel):
    """What an answer to a chat and an answer to a prompt have in common."""

    index: int
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class ChatChoice(CompletionChoice):
    """One answer to a chat."""

    message: AssistantMessage


class TextChoice(CompletionChoice):
    """One answer to a prompt."""

    text: str


class CompletionReply(OpenResponseModel):
    """What the answers of both routes have in common, where a request asks for no stream."""

    id: str
    created: int
    model: str
    usage: Usage


class ChatCompletion(CompletionReply):
    """Answer of `/v1/chat/completions`, where the request asks for no stream; vLLM may add other fields."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(CompletionReply):
    """Answer of `/v1/completions`, where the request asks for no stream; vLLM may add other fields."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class TokenizeReply(OpenResponseModel):
    """Answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeReply(ResponseModel):
    """Answer of `/detokenize`."""

    prompt: str


STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole answer; with `stream`, server-sent events, the last of which is `data: [DONE]`",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
"""The second form of an answer to a completion, for the OpenAPI document."""
