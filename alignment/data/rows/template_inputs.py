"""What a row of any shape may say to the chat template: a system text, tools, and the template's variables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from alignment.data.rows.cells import drop_nulls, parse_json_text, read_text
from alignment.data.rows.fields import RowFields
from alignment.data.rows.messages import Prompt
from alignment.data.unique_keys import check_keys, unique_keys
from alignment.errors import DataError
from alignment.groups import Message
from alignment.settings.model import is_template_variable


def add_system_turn(prompt: Prompt, fields: RowFields) -> Prompt:
    """The prompt with the row's system text as its first turn, if the row has one.

    Raises:
        DataError: the prompt is plain text, or its messages begin with another system text.
    """
    column = fields.system_column()
    system = read_text(fields.cell(column), column) if column is not None else ""
    if not system.strip() or not prompt:
        return prompt
    if isinstance(prompt, str):
        raise DataError(
            f"column {column!r} holds a system text, and a prompt of plain text has no turn for it; set prompt_as to "
            f"user_message, or write it into prompt_template as {{{column}}}"
        )
    if prompt[0].role not in ("system", "developer"):
        return (Message(role="system", content=system), *prompt)
    if prompt[0].content != system:
        raise DataError(f"column {column!r} holds another system text than the messages begin with")
    return prompt


def read_tools(fields: RowFields) -> tuple[Mapping[str, Any], ...]:
    """The functions that the assistant may call, from a list of JSON schemas or from the JSON text of one."""
    tools = fields.value("tools") if fields.has_field("tools") else ()
    if isinstance(tools, str):
        try:
            tools = json.loads(tools.strip() or "[]", object_pairs_hook=unique_keys)
        except DataError as error:
            raise DataError(f"tools: {error}") from error
        except ValueError as error:
            raise DataError(f"tools is a text that is not JSON: {error}") from error
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"tools must be a list of JSON schemas, not {tools!r:.50}")
    return tuple(_function(drop_nulls(tool, "tools")) for tool in tools)


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool in the form of OpenAI and of chat templates; LLaMA-Factory gives the function without that wrapper."""
    is_bare = "name" in tool and not {"type", "function"} & tool.keys()
    return {"type": "function", "function": tool} if is_bare else tool


def read_template_kwargs(fields: RowFields) -> Mapping[str, Any]:
    """Variables for the chat template, from a mapping or its JSON text; a null value counts as absent."""
    kwargs = fields.value("chat_template_kwargs") if fields.has_field("chat_template_kwargs") else {}
    check_keys(kwargs, "chat_template_kwargs")
    kwargs = parse_json_text(kwargs)
    if not isinstance(kwargs, dict) or not all(map(is_template_variable, kwargs)):
        raise DataError(f"chat_template_kwargs must be a mapping of a chat template's variables, not {kwargs!r:.60}")
    template_kwargs: Mapping[str, Any] = drop_nulls(kwargs, "chat_template_kwargs")
    return template_kwargs
