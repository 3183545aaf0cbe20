"""Which fields of OpenAI's and vLLM's requests are supported, and how their many spellings are unified for the engine.

a client's request ─► `to_engine_request`: without nulls, defaults and fields that ask for nothing ─► the engine
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serving.schema import RequestError

SAMPLING = {
    *("model", "n", "seed", "stop", "stream", "stream_options", "user"),
    *("max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs"),
    *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "bad_words"),
    *("allowed_token_ids", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"),
    *("truncate_prompt_tokens", "add_special_tokens", "return_token_ids", "return_tokens_as_token_ids"),
    *("truncation_side", "stream_interval", "response_format", "structured_outputs"),
}
"""Fields of chats and of text completions that reach vLLM."""
SUPPORTED = {
    "chat": SAMPLING
    | {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"}
    | {"reasoning_effort", "include_reasoning", "chat_template_kwargs", "add_generation_prompt", "documents"}
    | {"continue_final_message"},
    "completions": SAMPLING | {"prompt", "echo"},
    "tokenize": {"model", "prompt", "messages", "add_special_tokens", "add_generation_prompt", "return_token_strs"}
    | {"tools", "chat_template_kwargs", "continue_final_message"},
    "detokenize": {"model", "tokens"},
}
IGNORED = {
    *("metadata", "store", "service_tier", "safety_identifier", "verbosity", "session_id"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}
"""Fields that change nothing about the answer of an endpoint that is one's own."""
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "modalities": (["text"],),
    "prompt_logprobs": (0, False),
    "use_beam_search": (False,),
    "echo": (False,),
    "priority": (0,),
    "suffix": ("",),
    "length_penalty": (1, 1.0),
    "tools": ([],),
    "functions": ([],),
    "logit_bias": ({},),
    "bad_words": ([],),
    "stop": ([], ""),
    "function_call": ("none", "auto"),
    "top_k": (-1,),
    "thinking_token_budget": (-1,),
    "watermarking": (False,),
    "return_token_offsets": (False,),
    "return_prompt_text": (False,),
    "return_mm_kwargs": (False, True),
    "mm_payload": ("tensors", "none"),
    "routed_experts_prompt_start": (0,),
}
"""Values with which a field asks for what would be done without it. Null is such a value of every field."""
UNSUPPORTED = {
    "chat_template": "templates come with the model",
    "request_id": "the service issues the ids",
    "prompt_embeds": "prompts are texts or tokens",
    "prompt_logprobs": "echo with logprobs says them, and POST /v1/rewards rates what is given",
    "logprob_token_ids": "top_logprobs, or logprobs of a completion, tells the likeliest tokens",
    "use_beam_search": "answers are sampled",
    "length_penalty": "answers are sampled",
    "best_of": "ask for n answers",
    "suffix": "answers follow their prompt",
    "priority": "all requests wait in turn",
    "cache_salt": "the cache is the service's own",
    "kv_transfer_params": "the cache is the service's own",
    "ec_transfer_params": "the cache is the service's own",
    "vllm_xargs": "only documented fields are passed on",
    "mm_processor_kwargs": "there are only texts",
    "media_io_kwargs": "there are only texts",
    "modalities": "there are only texts",
    "mm_payload": "there are only texts",
    "return_mm_kwargs": "there are only texts",
    "audio": "there are only texts",
    "echo": "a chat is answered and not repeated; /v1/completions repeats prompts",
    "thinking_token_budget": "max_tokens counts thoughts too; reasoning_effort asks for fewer",
    "watermarking": "answers have no watermark",
    "repetition_detection": "an answer ends by its tokens and its limit; repetition_penalty avoids repetitions",
    "return_token_offsets": "no answer tells them; POST /tokenize tells the tokens of a prompt",
    "return_prompt_text": "POST /tokenize tells the tokens of a chat",
    "routed_experts_prompt_start": "routes of experts are not told",
    "functions": "OpenAI calls them tools now",
    "function_call": "OpenAI calls it tool_choice now",
    "prediction": "answers are not begun elsewhere",
    "web_search_options": "nothing is searched",
    "moderation": "nothing is moderated",
}
"""Fields that clients know and that are not supported, and why. All fields that stand nowhere here are unknown."""
MESSAGE_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content"}
"""Fields of a message that a template may read."""
MESSAGE_DEFAULTS: dict[str, tuple[Any, ...]] = {"type": ("text",)}
"""Values with which a field of a message asks for nothing. Every message of lm-eval 0.4.9 has this one."""
MESSAGE_IGNORED = {"refusal", "annotations", "audio", "function_call"}
"""Fields that the API's own answers have empty, so that clients send them back in messages."""
SMALLEST_TOP_P = 1e-6
"""What OpenAI's 0 becomes, which vLLM does not take: only the likeliest token is sampled."""


def to_engine_request(kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a request as the engine needs it.

    Args:
        kind: a key of `SUPPORTED`.
        body: the body that the client sent.

    Raises:
        RequestError: 400, a field is unknown or not supported; `param` names it.
    """
    fields = {}
    for name, value in body.items():
        if value is None or name in IGNORED or _is_default(value, DEFAULTS.get(name, ())) or _is_neutral(name, body):
            continue
        if name not in SUPPORTED[kind]:
            raise _unsupported_field(name)
        fields[name] = value
    if fields.get("top_p") == 0:
        fields["top_p"] = SMALLEST_TOP_P
    if "messages" in fields:
        fields["messages"] = to_engine_messages(fields["messages"])
    if "tools" in fields and fields.get("tool_choice", "auto") not in ("auto", "none"):
        fields["tools"] = [_strict_tool(index, tool) for index, tool in enumerate(fields["tools"])]
    return fields


def _strict_tool(index: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tool that has to be called as a strict one.

    Where it is not strict, vLLM 0.32 lets the model call it with any JSON, as a list or a number.
    """
    function = tool["function"]
    schema = function.get("parameters") or {"properties": {}}
    parameters = {"type": "object", **schema} if isinstance(schema, Mapping) else {}
    if parameters.get("type") != "object":
        message = f"The arguments of a call are an object, so the type of tools[{index}].function.parameters is object."
        raise RequestError(
            400, message, code="invalid_function_parameters", param=f"tools[{index}].function.parameters"
        )
    return {**tool, "function": {**function, "parameters": parameters, "strict": True}}


def to_engine_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages as the engine needs them: each has one text, and only fields that a template may read.

    Raises:
        RequestError: 400, as `to_engine_request`.
    """
    return [_engine_message(index, message) for index, message in enumerate(messages)]


def _engine_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one message as the engine needs it; raises RequestError (400) for a field that is not supported."""
    fields = {
        name: value
        for name, value in message.items()
        if name == "content" or (value is not None and not _is_default(value, MESSAGE_DEFAULTS.get(name, ())))
    }
    for name in fields.keys() - MESSAGE_FIELDS:
        if name not in MESSAGE_IGNORED:
            raise _unsupported_field(f"messages[{index}].{name}")
        if fields[name] and name != "refusal":
            raise RequestError(400, f"messages[{index}].{name} is not taken: there are only texts.", param="messages")
    engine_message = {
        name: value
        for name, value in fields.items()
        if name in MESSAGE_FIELDS and not (name == "tool_calls" and not value)
    }
    content = engine_message.get("content")
    if isinstance(content, list):
        # vLLM joins parts in the same way. They are joined here, so that records hold what the model read.
        engine_message["content"] = "\n".join(_text(content_part) for content_part in content)
    elif content is None and isinstance(fields.get("refusal"), str):
        engine_message["content"] = fields["refusal"]
    if engine_message["role"] == "function":  # OpenAI's old name of the role; the old form of a call has no id
        call_id = engine_message.get("tool_call_id", engine_message.get("name", "function"))
        engine_message |= {"role": "tool", "tool_call_id": call_id}
    return engine_message


def _text(content_part: Mapping[str, Any]) -> str:
    return str(content_part["refusal" if content_part["type"] == "refusal" else "text"])


def _is_default(value: Any, defaults: Sequence[Any]) -> bool:
    return any(type(value) is type(default) and bool(value == default) for default in defaults)


def _is_neutral(name: str, body: Mapping[str, Any]) -> bool:
    """Returns whether a field asks for nothing, given the other fields of its request."""
    value = body[name]
    if name == "best_of":  # the best n of n answers
        return _is_default(value, (body.get("n"),))
    if name == "stream_options":
        return not body.get("stream") and isinstance(value, Mapping) and not any(value.values())
    if name in ("tool_choice", "parallel_tool_calls"):
        return not body.get("tools") and (name != "tool_choice" or value in ("auto", "none"))
    return False


def _unsupported_field(name: str) -> RequestError:
    if name in UNSUPPORTED:
        return RequestError(
            400, f"The field {name} is not taken: {UNSUPPORTED[name]}.", code="unsupported_parameter", param=name
        )
    return RequestError(400, f"Unknown parameter: {name[:100]!r}.", code="unknown_parameter", param=name[:100])
