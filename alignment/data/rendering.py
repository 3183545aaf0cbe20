"""Conversations as a chat template writes them: the prompt that generation has, and where each answer stands behind it.

Nothing here trusts lengths of partial renderings: an answer is where its text is, behind exactly the prompt that it
would be generated from, and a rendering in which it is not is refused or not used.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from alignment.data.control_tokens import THOUGHTS, ControlTokens, Span
from alignment.errors import DataError
from alignment.groups import Message

Turns = tuple[Message, ...]

SENTINEL = "\ufdd3text\ufdd3"
"""Stands for a text to find where the template puts it; noncharacters of Unicode, which no text holds."""
MAX_TAILS = 16
"""Ends of turns that are remembered. A template has one or two, unless it prints something of its messages there."""
LONGEST_BY_CHANCE = 40
"""Characters of a text that may stand in another, or in the template's own words, without being printed."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields that hold the thought before an answer, by the names that templates and servers have for it."""
CALLS = ("tool_calls", "function_call")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateInputs:
    """What a template is given beside the messages."""

    tools: Sequence[Mapping[str, Any]] = ()
    """JSON schemas of the functions that may be called."""
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The row's own `chat_template_kwargs`, which win over the configured ones."""


NOTHING = TemplateInputs()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer behind its prompt: `body + end` is what a model writes after it."""

    prompt: str
    """The rendered turns before it, ending exactly where generation would begin."""
    body: str
    """The answer, with what the template writes before it and generation does not (an empty thought, a channel)."""
    content: str
    """The end of `body` that is the answer's own text."""
    end: str
    """What ends the turn, up to and with its end token; empty if the answer was cut."""
    space: str = ""
    """The white space that the template writes behind the end token, and no model does."""

    @property
    def text(self) -> str:
        """All that the template writes."""
        return self.prompt + self.body + self.end + self.space

    @property
    def span(self) -> Span:
        """Characters of `text` that a model writes."""
        return len(self.prompt), len(self.text) - len(self.space)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """One rendering of several answers, each behind exactly the prompt that it would be generated from."""

    text: str
    prompt: str
    """What stands before the first answer."""
    spans: tuple[Span, ...]
    """Characters of each answer that is trained on, with its end."""


class Renderer:
    """A tokenizer's chat template, with one date for the whole run."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, control: ControlTokens, end_texts: frozenset[str], date: datetime.date
    ) -> None:
        """`end_texts`: the end tokens, as templates write them. `date`: what templates print that ask for today's."""
        self.tokenizer = tokenizer
        self.control = control
        self.end_texts = end_texts
        self.unread_fields: Counter[str] = Counter()
        self._now = datetime.datetime.combine(date, datetime.time())
        self._tails: dict[str, None] = {}
        # Role, role before, whether it is the last turn and has calls, of turns that the template was seen to print.
        self._printed_places: set[tuple[str, str | None, bool, bool]] = set()
        self._takes_parts: bool | None = None

    def render(self, turns: Turns, *, inputs: TemplateInputs = NOTHING, answer_next: bool) -> str:
        """The turns through the chat template, ending where an answer would begin if `answer_next`.

        Raises:
            DataError: there is no template, or it refuses these messages.
        """
        if self._takes_parts is None:
            self._source(inputs)
            self._takes_parts = False
            self._takes_parts = self._needs_parts()
        # Templates take a call's arguments as a mapping; a few join them to text, and fail with a mapping.
        messages = self._messages(turns)
        try:
            return self._apply(messages, inputs, answer_next)
        except DataError:
            if not any(turn.fields.get("tool_calls") for turn in turns):
                raise
            return self._apply(self._messages(turns, arguments_as_text=True), inputs, answer_next)

    def prompt(self, turns: Turns, *, inputs: TemplateInputs = NOTHING, begun: bool = False) -> str:
        """What generation begins behind: the turns and the opening of an answer, or an answer that is begun already.

        Args:
            begun: the last turn is an answer to be continued, so that nothing stands behind its text.
        """
        if not begun:
            return self.render(turns, inputs=inputs, answer_next=True)
        last = turns[-1]
        marked = dataclasses.replace(last, content=last.content + SENTINEL)
        text, found, _ = self.render((*turns[:-1], marked), inputs=inputs, answer_next=False).rpartition(SENTINEL)
        if not found or not text.endswith(last.content.lstrip()):
            raise DataError(f"the chat template does not print the begun answer {last.content!r:.50} as it stands")
        return text

    def check_prompt(self, prompt: str, turns: Turns, inputs: TemplateInputs) -> None:
        """Checks that the template prints every turn's text, every call and the tools.

        Raises:
            DataError: something of the row would be lost; the text says what.
        """
        for index, turn in enumerate(turns):
            content = turn.content.strip()
            if content and not self._is_printed(prompt, turns, index, inputs):
                raise DataError(
                    f"the chat template leaves out what role {turn.role!r} says ({content!r:.50}); "
                    "take another model.chat_template, or leave such turns out of the data"
                )
            self._note_fields(turn)
        for name in inputs.kwargs:
            if not re.search(rf"\b{re.escape(name)}\b", self._source(inputs)):
                self.unread_fields[f"chat_template_kwargs.{name}"] += 1
        if inputs.tools and self._is_same(turns, inputs, turns, dataclasses.replace(inputs, tools=())):
            raise DataError(
                "the chat template does not print tools, so the model would not learn what it may call; take a "
                "model.chat_template that does"
            )
        names = [name for turn in turns for name in _calls(turn)]
        without = tuple(_without(turn, CALLS) for turn in turns)
        if names and (self._is_same(turns, inputs, without, inputs) or not all(name in prompt for name in names)):
            raise _calls_are_lost()

    def _is_same(
        self,
        turns: Turns,
        inputs: TemplateInputs,
        others: Turns,
        other_inputs: TemplateInputs,
        answer_next: bool = True,
    ) -> bool:
        """Whether the template writes the same without something. If it refuses that, it reads it."""
        try:
            without = self.render(others, inputs=other_inputs, answer_next=answer_next)
        except DataError:
            return False
        return without == self.render(turns, inputs=inputs, answer_next=answer_next)

    def places(self, prompt: str, turns: Turns, *, inputs: TemplateInputs, roles: Sequence[str]) -> list[Span]:
        """Where the texts of some roles stand in a rendered prompt.

        Raises:
            DataError: the template does not print them as they are.
        """
        marked = tuple(
            dataclasses.replace(turn, content=SENTINEL) if turn.role in roles and turn.content.strip() else turn
            for turn in turns
        )
        begun = turns[-1].role == "assistant" and turns[-1].trained
        around = self.prompt(marked, inputs=inputs, begun=begun).split(SENTINEL)
        contents = [turn.content for turn, mark in zip(turns, marked, strict=True) if mark is not turn]
        spans, position = [], len(around[0])
        for content, after in zip(contents, around[1:], strict=False):
            form = next((f for f in _forms(content) if prompt.startswith(f + after, position)), None)
            if form is None:
                break
            spans.append((position, position + len(form)))
            position += len(form) + len(after)
        if len(spans) != len(contents) or position != len(prompt) or not prompt.startswith(around[0]):
            raise DataError(
                "the prompt is longer than data.max_prompt_length, and the chat template does not print its texts as "
                "they are, so that they cannot be cut"
            )
        return spans

    def answer(
        self, turns: Turns, answer: Message, *, inputs: TemplateInputs = NOTHING, prompt: str, begun: bool = False
    ) -> Answer:
        """An answer behind the prompt of `turns`, found by its text.

        Args:
            prompt: as `prompt` gives it for these turns.
            begun: the answer continues the last of `turns`.

        Raises:
            DataError: the template drops a part of the answer, or writes the prompt otherwise before an answer.
        """
        turn, before = answer, turns
        if begun:
            fields = {**turns[-1].fields, **answer.fields}
            turn, before = (
                dataclasses.replace(answer, content=turns[-1].content + answer.content, fields=fields),
                turns[:-1],
            )
        self._note_fields(answer)
        whole = self.render((*before, turn), inputs=inputs, answer_next=False)
        opened = None if begun else _opened_thought(prompt)
        thought, content = _thought_and_content(answer)
        if whole.startswith(prompt):
            rest = whole[len(prompt) :]
        elif opened is not None and whole.startswith(prompt[: prompt.rindex(opened[0])]):
            if not (thought or "").strip():
                raise _no_thought(opened)
            return self._generated(before, turn, inputs, prompt, opened, thought or "", content)
        else:
            behind = None if begun or opened else self._behind_last_turn(before, turn, inputs, prompt, whole)
            if behind is None:
                raise _moved(prompt, whole)
            rest = behind
        if _calls(answer):
            return self._with_calls(before, turn, inputs, prompt, rest)
        body, tail = self._body(before, turn, inputs, rest, content)
        printed = next((form for form in _forms(content) if body.endswith(form)), None)
        if printed is None and thought is None:
            raise DataError(f"the chat template does not print the answer {content!r:.50} as it stands")
        wrapper = body[: len(body) - len(printed or "")]
        if thought is not None and (printed is None or thought.strip() not in wrapper):
            return self._generated(before, turn, inputs, prompt, opened, thought, content)
        if opened is not None and not _closes(wrapper, opened[1]) and not answer.truncated:
            if not (thought or "").strip():
                raise _no_thought(opened)
            return self._generated(before, turn, inputs, prompt, opened, thought or "", content)
        end, space = ("", "") if answer.truncated and answer.content else self._end(tail)
        return Answer(prompt=prompt, body=body, content=printed or "", end=end, space=space)

    def _behind_last_turn(
        self, before: Turns, turn: Message, inputs: TemplateInputs, prompt: str, whole: str
    ) -> str | None:
        """What a template that writes earlier turns otherwise, once an answer follows, writes behind the last of them.

        That turn's text and all that the prompt has behind it must stand alike before the answer, so that the answer
        goes on from there as it does from the prompt. None if it does not.
        """
        last = before[-1].content.strip()
        start = prompt.rfind(last) if last else -1
        marked = _without(dataclasses.replace(turn, content=SENTINEL), CALLS)
        head = self.render((*before, marked), inputs=inputs, answer_next=False).partition(SENTINEL)[0]
        stop = head.rfind(prompt[start:]) if start >= 0 and whole.startswith(head) else -1
        return whole[stop + len(prompt) - start :] if stop >= 0 else None

    def as_generated(self, turns: Turns, answer: Message, *, inputs: TemplateInputs = NOTHING, prompt: str) -> Answer:
        """An answer that a model wrote, behind the prompt as it stands, whatever the template makes of it.

        Raises:
            DataError: the template refuses it.
        """
        self.render((*turns, answer), inputs=inputs, answer_next=False)
        tail = self._tail(turns, answer, inputs)
        is_cut = tail is None or (answer.truncated and answer.content)
        end, space = ("", "") if is_cut else self._end(tail or "")
        return Answer(prompt=prompt, body=answer.content, content=answer.content, end=end, space=space)

    def conversation(
        self, turns: Turns, answers: Sequence[int], *, inputs: TemplateInputs = NOTHING, begun: bool
    ) -> Conversation | None:
        """All answers in one rendering, if each stands there behind exactly the prompt that generation has.

        The template's text of the turns before an answer must be the beginning of the whole; there must stand the
        answer, and then the end that it has where it is the last. An empty thought that the template writes only before
        the last answer may be missing before the others. None if this does not hold: templates that leave earlier
        thoughts out, move the system's text or end the last turn otherwise need one example per answer.

        Args:
            answers: which of the turns are trained on.
            begun: the first of them continues the turn before it.

        Raises:
            DataError: the last answer cannot be found.
        """
        *earlier, last_index = answers
        continues = begun and not earlier
        last_prompt = self.prompt(turns[:last_index], inputs=inputs, begun=continues)
        last = self.answer(turns[:last_index], turns[last_index], inputs=inputs, prompt=last_prompt, begun=continues)
        if earlier and last.end and not self.control.find(last.end):
            return None  # nothing would end the earlier answers
        text, spans = last.text, []
        for index in earlier:
            continues = begun and index == answers[0]
            prompt = self.prompt(turns[:index], inputs=inputs, begun=continues)
            stop = self._stop(text, prompt, turns[: index + 1], last, inputs, continues)
            if stop is None:
                return None
            spans.append((len(prompt), stop))
        first = text[: spans[0][0]] if spans else last_prompt
        return Conversation(text=text, prompt=first, spans=(*spans, last.span))

    def _stop(
        self, text: str, prompt: str, turns: Turns, last: Answer, inputs: TemplateInputs, begun: bool
    ) -> int | None:
        """Where the last of `turns`, an answer, ends in the whole text; None if it is not found there."""
        if not text.startswith(prompt):
            return None
        turn, start = turns[-1], len(prompt)
        if last.end and not turn.truncated and not _calls(turn) and _thought_and_content(turn)[0] is None and not begun:
            for form in _forms(turn.content):  # the common case, without rendering it
                if text.startswith(form + last.end, start) and not _opened_thought(prompt):
                    return start + len(form + last.end)
        answer = self.answer(turns[:-1], turn, inputs=inputs, prompt=prompt, begun=begun)
        wrapper = answer.body[: len(answer.body) - len(answer.content)]
        if text.startswith(answer.body, start):
            stop = start + len(answer.body)
        elif _is_empty_thought(wrapper) and text.startswith(answer.content, start):
            stop = start + len(answer.content)
        else:
            return None
        if turn.truncated:
            return stop
        end = answer.end or next((end for end in self.end_texts if text.startswith(end, stop)), "")
        if not text.startswith(end, stop) or not self.control.find(end):
            return None
        return stop + len(end)

    def _body(self, before: Turns, turn: Message, inputs: TemplateInputs, rest: str, content: str) -> tuple[str, str]:
        """`rest` without what the template writes behind an answer, and that."""
        forms = _forms(content)
        for tail in sorted(self._tails, key=len, reverse=True):
            body = rest[: len(rest) - len(tail)]
            if rest.endswith(tail) and body.endswith(forms):
                return body, tail
        found = self._tail(before, turn, inputs)
        if found is None or not rest.endswith(found):
            raise DataError(f"the chat template does not print the answer {content!r:.50} as it stands")
        if len(self._tails) >= MAX_TAILS:
            self._tails.clear()
        self._tails[found] = None
        return rest[: len(rest) - len(found)], found

    def _tail(self, before: Turns, turn: Message, inputs: TemplateInputs) -> str | None:
        """What the template writes behind an answer; None if it does not print answers."""
        marked = _without(dataclasses.replace(turn, content=SENTINEL), CALLS)
        _, found, tail = self.render((*before, marked), inputs=inputs, answer_next=False).rpartition(SENTINEL)
        return tail if found else None

    def _end(self, tail: str) -> tuple[str, str]:
        """The tail up to and with the first end token, and the white space behind it; all of it if there is none."""
        stop = min((tail.index(end) + len(end) for end in self.end_texts if end in tail), default=len(tail))
        return tail[:stop], tail[stop : len(tail) - len(tail[stop:].lstrip())]

    def _with_calls(self, before: Turns, turn: Message, inputs: TemplateInputs, prompt: str, rest: str) -> Answer:
        content = turn.content.strip()
        stop = rest.find(content) + len(content) if content else 0
        thought, _ = _thought_and_content(turn)
        is_lost = self._is_same((*before, turn), inputs, (*before, _without(turn, CALLS)), inputs, answer_next=False)
        if is_lost or content not in rest or not all(name in rest for name in _calls(turn)):
            raise _calls_are_lost()
        if thought is not None and thought.strip() not in rest:
            raise _thought_is_lost(thought)
        end_stops = [rest.index(end, stop) + len(end) for end in self.end_texts if end in rest[stop:]]
        if not end_stops:
            return Answer(prompt=prompt, body=rest, content=rest, end="")
        body_stop = max(start for end in self.end_texts if (start := rest.find(end, stop, min(end_stops))) >= 0)
        body, tail = rest[:body_stop], rest[body_stop:]
        end, space = ("", "") if turn.truncated else self._end(tail)
        return Answer(prompt=prompt, body=body, content=body, end=end, space=space)

    def _generated(
        self,
        before: Turns,
        turn: Message,
        inputs: TemplateInputs,
        prompt: str,
        opened: tuple[str, str] | None,
        thought: str,
        content: str,
    ) -> Answer:
        """An answer with a thought that the template does not print, written as a model generates it."""
        marks = opened or next((pair for pair in THOUGHTS if pair[1] in turn.content), None)
        if marks is None or _calls(turn):
            raise _thought_is_lost(thought)
        if marks[1] in turn.content:  # the text is as the model writes it, but for the mark that the prompt ends with
            body = turn.content
            if opened is not None and body.lstrip().startswith(opened[0].strip()):
                body = body.lstrip()[len(opened[0].strip()) :].lstrip("\n")
        else:
            body = f"{thought.strip()}\n{marks[1]}\n\n{content}"
        tail = self._tail(before, turn, inputs)
        end, space = ("", "") if turn.truncated or tail is None else self._end(tail)
        return Answer(prompt=prompt, body=body, content=body, end=end, space=space)

    def _is_printed(self, prompt: str, turns: Turns, index: int, inputs: TemplateInputs) -> bool:
        """Whether a turn's text is in the prompt. A short one may stand there by chance, as a part of another."""
        content = turns[index].content.strip()
        if len(content) > LONGEST_BY_CHANCE and prompt.count(content) == sum(content in turn.content for turn in turns):
            return True
        before = turns[index - 1].role if index else None
        place = (turns[index].role, before, index == len(turns) - 1, bool(_calls(turns[index])))
        if content in prompt and place in self._printed_places:
            return True
        is_printed = self._prints(turns, index, inputs)
        if is_printed:
            self._printed_places.add(place)
        return is_printed

    def _prints(self, turns: Turns, index: int, inputs: TemplateInputs) -> bool:
        """Whether the template prints the text of a turn, perhaps in other characters (as JSON, without a thought)."""
        marked = dataclasses.replace(turns[index], content=SENTINEL)
        return SENTINEL in self.render((*turns[:index], marked, *turns[index + 1 :]), inputs=inputs, answer_next=True)

    def _needs_parts(self) -> bool:
        """Whether the template takes a content only as a list of parts, as those of some image models do."""
        parts = [{"type": "text", "text": SENTINEL}]
        return not self._shows_sentinel(SENTINEL) and self._shows_sentinel(parts)

    def _shows_sentinel(self, content: str | list[dict[str, str]]) -> bool:
        try:
            return SENTINEL in self._apply([{"role": "user", "content": content}], NOTHING, answer_next=True)
        except DataError:
            return False

    def _note_fields(self, turn: Message) -> None:
        for name in turn.fields:
            if name not in REASONING and not self._reads(name):
                self.unread_fields[name] += 1

    def _messages(self, turns: Turns, *, arguments_as_text: bool = False) -> list[dict[str, Any]]:
        messages = []
        for turn in turns:
            message = turn.template_fields()
            if turn.fields:
                self._rename_reasoning(message)
                if message.get("tool_calls"):
                    message["tool_calls"] = [_call(call, as_text=arguments_as_text) for call in message["tool_calls"]]
            if self._takes_parts:
                message["content"] = [{"type": "text", "text": turn.content}]
            messages.append(message)
        return messages

    def _rename_reasoning(self, message: dict[str, Any]) -> None:
        """Gives a thought the name that the template has for it, if that is another."""
        name = next((name for name in REASONING if message.get(name)), None)
        if name is not None and not self._reads(name):
            known = next((other for other in REASONING if self._reads(other)), name)
            message[known] = message.pop(name)

    def _reads(self, field: str) -> bool:
        """Whether the template reads a field of messages, as `message.field` or `message['field']`."""
        return re.search(rf"[.'\"]{re.escape(field)}\b", self._source()) is not None

    def _apply(self, messages: list[dict[str, Any]], inputs: TemplateInputs, answer_next: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=list(inputs.tools) or None,
                    tokenize=False,
                    add_generation_prompt=answer_next,
                    strftime_now=self._now.strftime,
                    **inputs.kwargs,
                )
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # a template is a program of somebody else's, and may fail in any way
            raise DataError(f"the chat template fails on these messages: {type(error).__name__}: {error}") from error

    def _source(self, inputs: TemplateInputs = NOTHING) -> str:
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


def _forms(content: str) -> tuple[str, ...]:
    """A text as templates print it: as it stands, or trimmed."""
    return content, content.lstrip(), content.rstrip(), content.strip()


def _opened_thought(prompt: str) -> tuple[str, str] | None:
    """The marks of a thought that the prompt opens at its end, and that the answer has to close."""
    stripped = prompt.rstrip()
    return next((pair for pair in THOUGHTS if stripped.endswith(pair[0].rstrip())), None)


def _closes(wrapper: str, close: str) -> bool:
    """Whether what stands before an answer is a thought that is not empty, and its end."""
    thought, found, _ = wrapper.partition(close)
    return bool(found) and bool(thought.strip())


def _is_empty_thought(wrapper: str) -> bool:
    return any(wrapper.split() in ([open_.strip(), close], [open_.strip() + close]) for open_, close in THOUGHTS)


def _thought_and_content(turn: Message) -> tuple[str | None, str]:
    """An answer's thought, from a field or from its text, where it may be empty, and the text behind it."""
    named = next((turn.fields[name] for name in REASONING if turn.fields.get(name)), None)
    if isinstance(named, str) and named.strip():
        return named, turn.content
    for open_, close in THOUGHTS:
        thought, found, content = turn.content.partition(close)
        if found:
            return thought.rpartition(open_.strip())[2], content
    return None, turn.content


def _calls(turn: Message) -> list[str]:
    """Names of the functions that a message calls."""
    calls = [*(turn.fields.get("tool_calls") or ()), *filter(None, [turn.fields.get("function_call")])]
    functions = [call.get("function", call) if isinstance(call, Mapping) else {} for call in calls]
    return [str(function.get("name", "")) for function in functions]


def _call(call: Any, *, as_text: bool) -> Any:
    """A call whose arguments are a mapping, as templates and servers have them; clients send its JSON text.

    Raises:
        DataError: the arguments are a text that is not JSON.
    """
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], as_text=as_text)}
    arguments = call.get("arguments")
    if as_text and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if not as_text and isinstance(arguments, str):
        try:
            return {**call, "arguments": json.loads(arguments or "{}")}
        except ValueError as error:
            raise DataError(f"the arguments of a tool call are a text that is not JSON: {arguments!r:.50}") from error
    return call


def _without(turn: Message, names: Sequence[str]) -> Message:
    return dataclasses.replace(turn, fields={k: v for k, v in turn.fields.items() if k not in names})


def _moved(prompt: str, whole: str) -> DataError:
    common = next((i for i, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(whole))
    lost = prompt[common:]
    return DataError(
        f"the text of the prompt changes when an answer follows ({len(lost)} of its last characters differ: generation "
        f"has {lost!r:.60}, a given answer {whole[common:]!r:.60}), so training would see another prompt than is asked "
        "later; take another model.chat_template, or set model.chat_template_kwargs"
    )


def _no_thought(opened: tuple[str, str]) -> DataError:
    return DataError(
        f"the chat template's prompt opens a thought ({opened[0].strip()}), and the answer has none, so training would "
        "see another prompt than is asked later, or teach not to think; give the answers a reasoning_content, or take "
        "a prompt without it, as by model.chat_template_kwargs: {enable_thinking: false} if the template knows that"
    )


def _thought_is_lost(thought: str) -> DataError:
    return DataError(
        f"the chat template does not print the answer's reasoning ({thought.strip()!r:.50}), so the model would learn "
        "not to think; take a model.chat_template that does, or leave the reasoning out of the data"
    )


def _calls_are_lost() -> DataError:
    return DataError(
        "the chat template does not print tool_calls, so the model would learn not to call; take a "
        "model.chat_template that does, or leave such rows out"
    )
