"""Which fields of OpenAI's and vLLM's requests are taken, and what their many spellings become before the engine.

What a client sends ─► `taken`: no nulls, no defaults, nothing that says nothing here ─► the engine
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serving.schema import Refused

SAMPLING = {
    *("model", "n", "seed", "stop", "stream", "stream_options", "user"),
    *("max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs"),
    *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "bad_words"),
    *("allowed_token_ids", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"),
    *("truncate_prompt_tokens", "add_special_tokens", "return_token_ids", "return_tokens_as_token_ids"),
    *("truncation_side", "stream_interval", "response_format", "structured_outputs"),
}
"""Fields of both kinds of requests that reach vLLM."""
TAKEN = {
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
"""Fields that say nothing about the answer of an endpoint that is one's own."""
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
"""Values with which a field asks for what would be done without it; null does for every field."""
REFUSED = {
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
"""Fields that clients know and that cannot be followed, and why, where `TAKEN` has them not; others are not known."""
TURN = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content"}
"""Fields of a message that a template may read."""
TURN_DEFAULTS: dict[str, tuple[Any, ...]] = {"type": ("text",)}
"""Values with which a field of a message says nothing; each of lm-eval 0.4.9 has this one."""
TURN_IGNORED = {"refusal", "annotations", "audio", "function_call"}
"""Fields of a message that the API's own answers have, empty, and that clients send back."""
SMALLEST_TOP_P = 1e-6
"""Of OpenAI's 0, which vLLM does not take: the likeliest token alone."""


def taken(kind: str, sent: Mapping[str, Any]) -> dict[str, Any]:
    """A request as the engine is to have it.

    Raises:
        Refused: 400, a field is not known, or cannot be followed; `param` names it.
    """
    fields = {}
    for name, value in sent.items():
        if value is None or name in IGNORED or _is_default(value, DEFAULTS.get(name, ())) or _says_nothing(name, sent):
            continue
        if name not in TAKEN[kind]:
            raise _refused(name)
        fields[name] = value
    if fields.get("top_p") == 0:
        fields["top_p"] = SMALLEST_TOP_P
    if "messages" in fields:
        fields["messages"] = turns(fields["messages"])
    if "tools" in fields and fields.get("tool_choice", "auto") not in ("auto", "none"):
        fields["tools"] = [_strict(place, tool) for place, tool in enumerate(fields["tools"])]
    return fields


def _strict(place: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool that has to be called. Where it is not strict, vLLM 0.32 has it called with any JSON: a list, a number."""
    function = tool["function"]
    sent = function.get("parameters") or {"properties": {}}
    parameters = {"type": "object", **sent} if isinstance(sent, Mapping) else {}
    if parameters.get("type") != "object":
        message = f"The arguments of a call are an object, so the type of tools[{place}].function.parameters is object."
        raise Refused(400, message, code="invalid_function_parameters", param=f"tools[{place}].function.parameters")
    return {**tool, "function": {**function, "parameters": parameters, "strict": True}}


def turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as the engine is to have them: one text each, and only what a template may read.

    Raises:
        Refused: 400, as for `taken`.
    """
    return [_turn(place, turn) for place, turn in enumerate(messages)]


def _turn(place: int, turn: Mapping[str, Any]) -> dict[str, Any]:
    fields = {
        name: value
        for name, value in turn.items()
        if name == "content" or (value is not None and not _is_default(value, TURN_DEFAULTS.get(name, ())))
    }
    for name in fields.keys() - TURN:
        if name not in TURN_IGNORED:
            raise _refused(f"messages[{place}].{name}")
        if fields[name] and name != "refusal":
            raise Refused(400, f"messages[{place}].{name} is not taken: there are only texts.", param="messages")
    kept = {name: value for name, value in fields.items() if name in TURN and not (name == "tool_calls" and not value)}
    content = kept.get("content")
    if isinstance(content, list):
        # As vLLM joins them; in one place, so that what is kept of a chat is what the model read.
        kept["content"] = "\n".join(_text(part) for part in content)
    elif content is None and isinstance(fields.get("refusal"), str):
        kept["content"] = fields["refusal"]
    if kept["role"] == "function":  # OpenAI's old name for it; the call's own has no id
        kept |= {"role": "tool", "tool_call_id": kept.get("tool_call_id", kept.get("name", "function"))}
    return kept


def _text(part: Mapping[str, Any]) -> str:
    return str(part["refusal" if part["type"] == "refusal" else "text"])


def _is_default(value: Any, defaults: Sequence[Any]) -> bool:
    return any(type(value) is type(default) and bool(value == default) for default in defaults)


def _says_nothing(name: str, sent: Mapping[str, Any]) -> bool:
    """Whether a field asks for nothing beside the others of its request."""
    value = sent[name]
    if name == "best_of":  # the best n of n
        return _is_default(value, (sent.get("n"),))
    if name == "stream_options":
        return not sent.get("stream") and isinstance(value, Mapping) and not any(value.values())
    if name in ("tool_choice", "parallel_tool_calls"):
        return not sent.get("tools") and (name != "tool_choice" or value in ("auto", "none"))
    return False


def _refused(name: str) -> Refused:
    if name in REFUSED:
        return Refused(
            400, f"The field {name} is not taken: {REFUSED[name]}.", code="unsupported_parameter", param=name
        )
    return Refused(400, f"Unknown parameter: {name[:100]!r}.", code="unknown_parameter", param=name[:100])
