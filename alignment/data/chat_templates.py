"""Chat templates: by the names that a configuration gives them, with variables and a date, and applied to messages."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from alignment.data.message_fields import REASONING_FIELDS, convert_call, mark_arguments, mark_tools
from alignment.errors import ConfigError, DataError
from alignment.files import replace_atomically
from alignment.groups import Message
from alignment.run_folder import RunFolder

Turns = tuple[Message, ...]

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""  # noqa: E501
ZEPHYR = """{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""  # noqa: E501
CHAT_TEMPLATES = {"chatml": CHATML, "zephyr": ZEPHYR}
SENTINEL = "\ufdd3text\ufdd3"
"""Replaces a text to find where the template writes it; it has noncharacters of Unicode, which no text holds."""


def chat_template(name: str | None, tokenizer_templates: Mapping[str, str] | None = None) -> str | None:
    """Returns the Jinja text of a `model.chat_template`.

    Args:
        name: the name of one of the tokenizer's templates or of `CHAT_TEMPLATES`, a path, Jinja text, or None.
        tokenizer_templates: the tokenizer's templates by name, if it has several.

    Returns:
        The Jinja text; None for None.

    Raises:
        ConfigError: the name is none of these.
    """
    if name is None:
        return None
    if name in (templates_by_name := {**CHAT_TEMPLATES, **(tokenizer_templates or {})}):
        return templates_by_name[name]
    if "{%" in name or "{{" in name:
        return name
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    raise ConfigError(
        f"model.chat_template {name!r} is neither a known name ({', '.join(CHAT_TEMPLATES)}) nor a file nor Jinja text"
    )


def with_kwargs(template: str, kwargs: Mapping[str, Any]) -> str:
    """Returns a chat template in which `model.chat_template_kwargs` are defaults; values of a caller override them.

    Raises:
        ConfigError: the template does not mention one of these variables.
    """
    for name in kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ConfigError(
                f"model.chat_template_kwargs: the chat template knows no {name!r}, so it would do nothing"
            )
    defaults = (
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_jinja_literal(value)} %}}{{%- endif %}}"
        for name, value in kwargs.items()
    )
    return "".join(defaults) + template


def _jinja_literal(value: Any) -> str:
    """A value of YAML as a Jinja literal, which is JSON except for null."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_jinja_literal(key)}: {_jinja_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_jinja_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


DATE_OF_RUN: ContextVar[datetime.date | None] = ContextVar("DATE_OF_RUN", default=None)
"""The date that templates print in this process; scorers use it too, because they do not know the run's folder."""


def run_date(run_folder: RunFolder) -> datetime.date:
    """Returns the date on which a run began, from its folder; the first call writes today's date there.

    Chat templates that print today's date print this one, so that the prompts of a run stay the same on every day.
    """
    file = run_folder.date_file
    if file.is_file():
        return datetime.date.fromisoformat(file.read_text(encoding="utf-8").strip())
    today = datetime.date.today()
    with replace_atomically(file) as partial_file:
        partial_file.write_text(f"{today.isoformat()}\n", encoding="utf-8")
    return today


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateInputs:
    """Arguments of a chat template besides the messages."""

    tools: Sequence[Mapping[str, Any]] = ()
    """JSON schemas of the functions that may be called."""
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The row's own `chat_template_kwargs`, which override the configured ones."""


NO_INPUTS = TemplateInputs()


class ChatTemplate:
    """The chat template of a tokenizer, with one date for the whole run."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, date: datetime.date) -> None:
        """`date`: the date that the template prints as today's."""
        self.tokenizer = tokenizer
        self._date_time = datetime.datetime.combine(date, datetime.time())
        self._needs_content_parts: bool | None = None

    def render(self, turns: Turns, *, inputs: TemplateInputs = NO_INPUTS, answer_next: bool) -> str:
        """The turns as the chat template writes them; with `answer_next`, the text ends where an answer would begin.

        Raises:
            DataError: there is no template, or it refuses these messages.
        """
        if self._needs_content_parts is None:
            self.source(inputs)
            self._needs_content_parts = False
            self._needs_content_parts = self._probe_content_parts()
        # Most templates take the arguments of a call as a mapping; a few take a text, and fail with a mapping.
        messages = self._messages(turns)
        try:
            return self._apply(messages, inputs, answer_next)
        except DataError:
            if not any(turn.fields.get("tool_calls") for turn in turns):
                raise
            return self._apply(self._messages(turns, arguments_as_text=True), inputs, answer_next)

    def renders_equally(
        self,
        turns: Turns,
        inputs: TemplateInputs,
        other_turns: Turns,
        other_inputs: TemplateInputs,
        answer_next: bool = True,
    ) -> bool:
        """True if the template writes the same text for both inputs; False if it refuses the second."""
        try:
            other_text = self.render(other_turns, inputs=other_inputs, answer_next=answer_next)
        except DataError:
            return False
        return other_text == self.render(turns, inputs=inputs, answer_next=answer_next)

    def check_arguments(self, turns: Turns, inputs: TemplateInputs, *, answer_next: bool) -> None:
        """Checks that the template prints every value inside the arguments of calls.

        Raises:
            DataError: it leaves one out.
        """
        marked_turns: list[Message] = []
        names_by_mark: dict[str, str] = {}
        for turn in turns:
            marked_turn, marks = mark_arguments(turn, len(names_by_mark))
            marked_turns.append(marked_turn)
            names_by_mark |= marks
        name = self._unprinted_name(names_by_mark, tuple(marked_turns), inputs, answer_next)
        if name is not None:
            raise DataError(
                f"the chat template does not print the argument {name!r:.50} of a tool call, so the model would learn "
                "to call without it; take a model.chat_template that does, or leave such rows out"
            )

    def check_tools(self, turns: Turns, inputs: TemplateInputs) -> None:
        """Checks that the template prints the names of the tools' functions and of their parameters.

        Raises:
            DataError: it leaves one out.
        """
        marked_tools, names_by_mark = mark_tools(inputs.tools)
        marked_inputs = dataclasses.replace(inputs, tools=marked_tools)
        name = self._unprinted_name(names_by_mark, turns, marked_inputs, answer_next=True)
        if name is not None:
            raise DataError(
                f"the chat template does not print {name!r:.50} of the tools, so the model would not learn what it may "
                "call; take a model.chat_template that does"
            )

    def _unprinted_name(
        self, names_by_mark: Mapping[str, str], turns: Turns, inputs: TemplateInputs, answer_next: bool
    ) -> str | None:
        """The name of the first mark that the template does not print; None if it prints all, or refuses marks."""
        if not names_by_mark:
            return None
        try:
            text = self.render(turns, inputs=inputs, answer_next=answer_next)
        except DataError:
            return None
        return next((name for mark, name in names_by_mark.items() if mark not in text), None)

    def reads(self, field: str) -> bool:
        """True if the template reads a field of messages, as `message.field` or `message['field']`."""
        return re.search(rf"[.'\"]{re.escape(field)}\b", self.source()) is not None

    def source(self, inputs: TemplateInputs = NO_INPUTS) -> str:
        """The Jinja text of the template, which may depend on whether there are tools.

        Raises:
            DataError: the tokenizer has no template, or several and no default among them.
        """
        template = self.tokenizer.chat_template
        if template is None:
            raise DataError(
                "the rows are messages, but the tokenizer has no chat template; set model.chat_template, e.g. to chatml"
            )
        if isinstance(template, dict):
            if "default" not in template:
                raise DataError(
                    f"the tokenizer has several chat templates ({', '.join(sorted(template))}) and none is the "
                    "default; set model.chat_template to one of these names"
                )
            template = template["tool_use"] if inputs.tools and "tool_use" in template else template["default"]
        return str(template)

    def _messages(self, turns: Turns, *, arguments_as_text: bool = False) -> list[dict[str, Any]]:
        messages = []
        for turn in turns:
            message = turn.template_fields()
            if turn.fields:
                self._rename_reasoning(message)
                if message.get("tool_calls"):
                    message["tool_calls"] = [
                        convert_call(call, as_text=arguments_as_text) for call in message["tool_calls"]
                    ]
            if self._needs_content_parts:
                message["content"] = [{"type": "text", "text": turn.content}]
            messages.append(message)
        return messages

    def _rename_reasoning(self, message: dict[str, Any]) -> None:
        """Renames the field of the reasoning to the name that the template reads, if that is another one."""
        name = next((name for name in REASONING_FIELDS if message.get(name)), None)
        if name is not None and not self.reads(name):
            template_name = next((field for field in REASONING_FIELDS if self.reads(field)), name)
            message[template_name] = message.pop(name)

    def _apply(self, messages: list[dict[str, Any]], inputs: TemplateInputs, answer_next: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=list(inputs.tools) or None,
                    tokenize=False,
                    add_generation_prompt=answer_next,
                    strftime_now=self._date_time.strftime,
                    **inputs.kwargs,
                )
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # a template is a program that may fail in any way
            raise DataError(f"the chat template fails on these messages: {type(error).__name__}: {error}") from error

    def _probe_content_parts(self) -> bool:
        """True if the template accepts a content only as a list of parts, as the templates of some image models do."""
        content_parts = [{"type": "text", "text": SENTINEL}]
        return not self._prints_sentinel(SENTINEL) and self._prints_sentinel(content_parts)

    def _prints_sentinel(self, content: str | list[dict[str, str]]) -> bool:
        try:
            return SENTINEL in self._apply([{"role": "user", "content": content}], NO_INPUTS, answer_next=True)
        except DataError:
            return False
