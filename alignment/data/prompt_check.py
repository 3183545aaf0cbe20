"""Checks that a chat template prints all that a prompt holds, so that nothing of a row is lost without a word."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

from alignment.data.chat_templates import SENTINEL, ChatTemplate, TemplateInputs, Turns
from alignment.data.message_fields import CALL_FIELDS, REASONING_FIELDS, called_names, drop_fields, lost_calls_error
from alignment.errors import DataError
from alignment.groups import Message

MAX_CHANCE_LENGTH = 40
"""A text of at most this many characters may occur in a rendered prompt by chance, as a part of another text."""


class PromptCheck:
    """Checks prompts that a chat template has rendered."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.unread_fields: Counter[str] = Counter()
        """How often a message has a field that the template does not read, by the name of the field."""
        # Positions whose turns the template prints: role, previous role, whether it is the last turn, whether it calls.
        self._printed_positions: set[tuple[str, str | None, bool, bool]] = set()

    def check(self, prompt: str, turns: Turns, inputs: TemplateInputs) -> None:
        """Checks that the template prints the text of every turn, every call and the tools.

        Raises:
            DataError: a part of the row would be lost; the text says which.
        """
        for index, turn in enumerate(turns):
            content = turn.content.strip()
            if content and not self._is_printed(prompt, turns, index, inputs):
                raise DataError(
                    f"the chat template leaves out what role {turn.role!r} says ({content!r:.50}); "
                    "take another model.chat_template, or leave such turns out of the data"
                )
            self.count_unread_fields(turn)
        for name in inputs.kwargs:
            if not re.search(rf"\b{re.escape(name)}\b", self.template.source(inputs)):
                self.unread_fields[f"chat_template_kwargs.{name}"] += 1
        if inputs.tools and self.template.renders_equally(turns, inputs, turns, dataclasses.replace(inputs, tools=())):
            raise DataError(
                "the chat template does not print tools, so the model would not learn what it may call; take a "
                "model.chat_template that does"
            )
        if inputs.tools:
            self.template.check_tools(turns, inputs)
        names = [name for turn in turns for name in called_names(turn)]
        turns_without_calls = tuple(drop_fields(turn, CALL_FIELDS) for turn in turns)
        if names and (
            self.template.renders_equally(turns, inputs, turns_without_calls, inputs)
            or not all(name in prompt for name in names)
        ):
            raise lost_calls_error()
        if names:
            self.template.check_arguments(turns, inputs, answer_next=True)

    def count_unread_fields(self, turn: Message) -> None:
        """Counts the fields of a turn that the template does not read."""
        for name in turn.fields:
            if name not in REASONING_FIELDS and not self.template.reads(name):
                self.unread_fields[name] += 1

    def _is_printed(self, prompt: str, turns: Turns, index: int, inputs: TemplateInputs) -> bool:
        """True if the text of a turn is in the prompt. A short text may be there by chance, as a part of another."""
        content = turns[index].content.strip()
        if len(content) > MAX_CHANCE_LENGTH and prompt.count(content) == sum(content in turn.content for turn in turns):
            return True
        previous_role = turns[index - 1].role if index else None
        position_key = (turns[index].role, previous_role, index == len(turns) - 1, bool(called_names(turns[index])))
        if content in prompt and position_key in self._printed_positions:
            return True
        is_printed = self._renders_content(turns, index, inputs)
        if is_printed:
            self._printed_positions.add(position_key)
        return is_printed

    def _renders_content(self, turns: Turns, index: int, inputs: TemplateInputs) -> bool:
        """True if the template prints the text of a turn, perhaps changed (as JSON, or without its reasoning)."""
        marked_turn = dataclasses.replace(turns[index], content=SENTINEL)
        return SENTINEL in self.template.render(
            (*turns[:index], marked_turn, *turns[index + 1 :]), inputs=inputs, answer_next=True
        )
