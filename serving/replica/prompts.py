"""Chats on their way into vLLM: what people write never becomes a control token, as in training.

Messages are shielded before vLLM renders them. `alignment.data.control_tokens` encodes the rendered text, and takes
what was shielded for ordinary characters. vLLM itself encodes a chat without control tokens.
"""

from __future__ import annotations

import asyncio
from typing import Any

from alignment.data.control_tokens import ControlTokens
from alignment.errors import DataError


def shield_chat(control_tokens: ControlTokens, body: dict[str, Any]) -> dict[str, Any]:
    """Returns the body of a chat request, in which every control token in messages and tools is replaced by a mark."""
    shielded_body = {**body, "messages": control_tokens.shield_messages(body["messages"])}
    if body.get("tools"):
        shielded_body["tools"] = control_tokens.shield(body["tools"])
    return shielded_body


def read_shielded_prompts(renderer: Any) -> ControlTokens:
    """Has a renderer of vLLM encode shielded control tokens as text.

    It replaces `_tokenize_prompt_async`, which is not public, and which encodes every text.

    Returns:
        The object that shields texts for this renderer.
    """
    control_tokens = ControlTokens(renderer.get_tokenizer())
    tokenize = renderer._tokenize_prompt_async

    async def tokenize_prompt(prompt: Any, params: Any) -> Any:
        text = prompt["prompt"]
        if not control_tokens.is_shielded(text):
            return await tokenize(prompt, params)
        try:
            encoding = await asyncio.to_thread(control_tokens.encode, text)
        except DataError as error:
            raise ValueError(str(error)) from error  # vLLM answers it with the status 400
        return {**prompt, "prompt": control_tokens.unshield(text), "prompt_token_ids": encoding.ids}

    renderer._tokenize_prompt_async = tokenize_prompt
    return control_tokens
