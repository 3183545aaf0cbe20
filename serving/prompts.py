"""Chats on their way into vLLM: what people write is never a control token, as it never is in training.

The messages are shielded before vLLM renders them, and the rendered text is encoded by `alignment.data.control_tokens`,
which takes what was shielded for ordinary characters. A chat without control tokens goes vLLM's own way.
"""

from __future__ import annotations

import asyncio
from typing import Any

from alignment.data.control_tokens import ControlTokens
from alignment.errors import DataError


def shield_chat(control_tokens: ControlTokens, body: dict[str, Any]) -> dict[str, Any]:
    """The body of a chat request with a stand-in for every control token in its messages and tools."""
    shielded = {**body, "messages": control_tokens.shield_messages(body["messages"])}
    if body.get("tools"):
        shielded["tools"] = control_tokens.shield(body["tools"])
    return shielded


def read_shielded_prompts(renderer: Any) -> ControlTokens:
    """Has a renderer of vLLM encode what was shielded as text; returns what shields for it.

    `_tokenize_prompt_async`, through which every text goes into token ids, is not public.
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
            raise ValueError(str(error)) from error  # which vLLM answers with status 400
        return {**prompt, "prompt": control_tokens.unshield(text), "prompt_token_ids": encoding.ids}

    renderer._tokenize_prompt_async = tokenize_prompt
    return control_tokens
