"""Renders conversations by a chat template, and finds each answer after the prompt that generation would use.

An answer is found by its text, after exactly the prompt that it would be generated from, and never by the lengths of
partial renderings. A rendering in which an answer is not found there is refused or not used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from alignment.data.chat_templates import NO_INPUTS, SENTINEL, ChatTemplate, TemplateInputs, Turns
from alignment.data.control_tokens import REASONING_MARKS, ControlTokens, Span
from alignment.data.message_fields import (
    CALL_FIELDS,
    called_names,
    closes_reasoning,
    drop_fields,
    is_empty_reasoning,
    lost_calls_error,
    open_reasoning_marks,
    split_reasoning,
)
from alignment.errors import DataError
from alignment.groups import Message

MAX_TAILS = 16
"""Number of ends of turns to remember. A template has one or two, unless it prints a part of the messages there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderedAnswer:
    """One answer after its prompt; a model would write `body + end`."""

    prompt: str
    """The rendered turns before the answer, up to exactly where generation would begin."""
    body: str
    """The answer, with the text that the template writes before it and generation does not (an empty reasoning)."""
    content: str
    """The part of `body`, at its end, that is the answer's own text."""
    end: str
    """The end of the turn, up to and including its end token; empty if the answer was cut off."""
    space: str = ""
    """White space that the template writes after the end token; a model does not write it."""

    @property
    def text(self) -> str:
        """The whole rendered text, with the prompt."""
        return self.prompt + self.body + self.end + self.space

    @property
    def span(self) -> Span:
        """Start and stop of the characters of `text` that a model writes."""
        return len(self.prompt), len(self.text) - len(self.space)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderedConversation:
    """One rendering with several answers, each after exactly the prompt that it would be generated from."""

    text: str
    """The whole rendered text."""
    prompt: str
    """The text before the first answer."""
    spans: tuple[Span, ...]
    """Start and stop (characters of `text`) of each answer that is trained on, with its end."""


class Renderer:
    """Renders prompts and answers by a chat template, and says where in the text each answer stands."""

    def __init__(self, template: ChatTemplate, control: ControlTokens, end_texts: frozenset[str]) -> None:
        """Makes a renderer.

        Args:
            control: the control tokens of the tokenizer.
            end_texts: the texts of the end tokens, as templates write them.
        """
        self.template = template
        self.control = control
        self.end_texts = end_texts
        self._tails: dict[str, None] = {}

    def prompt(self, turns: Turns, *, inputs: TemplateInputs = NO_INPUTS, continues_answer: bool = False) -> str:
        """The prompt of generation: the turns and the beginning of an answer, up to where the model continues.

        Args:
            continues_answer: the last turn is an answer to be continued, so that the prompt ends with its text.

        Raises:
            DataError: the template refuses these messages, or does not print the answer to be continued unchanged.
        """
        if not continues_answer:
            return self.template.render(turns, inputs=inputs, answer_next=True)
        last_turn = turns[-1]
        marked_turn = dataclasses.replace(last_turn, content=last_turn.content + SENTINEL)
        text, separator, _ = self.template.render(
            (*turns[:-1], marked_turn), inputs=inputs, answer_next=False
        ).rpartition(SENTINEL)
        if not separator or not text.endswith(last_turn.content.lstrip()):
            raise DataError(f"the chat template does not print the begun answer {last_turn.content!r:.50} as it stands")
        return text

    def find_texts(self, prompt: str, turns: Turns, *, inputs: TemplateInputs, roles: Sequence[str]) -> list[Span]:
        """Start and stop (characters) of the texts of some roles in a rendered prompt.

        Raises:
            DataError: the template does not print these texts unchanged.
        """
        marked_turns = tuple(
            dataclasses.replace(turn, content=SENTINEL) if turn.role in roles and turn.content.strip() else turn
            for turn in turns
        )
        continues_answer = turns[-1].role == "assistant" and turns[-1].trained
        separators = self.prompt(marked_turns, inputs=inputs, continues_answer=continues_answer).split(SENTINEL)
        contents = [
            turn.content for turn, marked_turn in zip(turns, marked_turns, strict=True) if marked_turn is not turn
        ]
        spans, position = [], len(separators[0])
        for content, separator in zip(contents, separators[1:], strict=False):
            form = next((f for f in _whitespace_forms(content) if prompt.startswith(f + separator, position)), None)
            if form is None:
                break
            spans.append((position, position + len(form)))
            position += len(form) + len(separator)
        if len(spans) != len(contents) or position != len(prompt) or not prompt.startswith(separators[0]):
            raise DataError(
                "the prompt is longer than data.max_prompt_length, and the chat template does not print its texts as "
                "they are, so that they cannot be cut"
            )
        return spans

    def answer(
        self,
        turns: Turns,
        answer: Message,
        *,
        inputs: TemplateInputs = NO_INPUTS,
        prompt: str,
        continues_answer: bool = False,
    ) -> RenderedAnswer:
        """An answer after the prompt of `turns`, found by its text.

        Args:
            prompt: the prompt of these turns, as `prompt` returns it.
            continues_answer: the answer continues the last of `turns`.

        Raises:
            DataError: the template drops a part of the answer, or changes the prompt when an answer follows.
        """
        turn, context = answer, turns
        if continues_answer:
            fields = {**turns[-1].fields, **answer.fields}
            turn, context = (
                dataclasses.replace(answer, content=turns[-1].content + answer.content, fields=fields),
                turns[:-1],
            )
        full_text = self.template.render((*context, turn), inputs=inputs, answer_next=False)
        open_marks = None if continues_answer else open_reasoning_marks(prompt)
        reasoning_text, content = split_reasoning(answer)
        if full_text.startswith(prompt):
            rest = full_text[len(prompt) :]
        elif open_marks is not None and full_text.startswith(prompt[: prompt.rindex(open_marks[0])]):
            if not (reasoning_text or "").strip():
                raise _missing_reasoning_error(open_marks)
            return self._answer_as_generated(context, turn, inputs, prompt, open_marks, reasoning_text or "", content)
        else:
            continuation = (
                None
                if continues_answer or open_marks
                else self._text_after_last_turn(context, turn, inputs, prompt, full_text)
            )
            if continuation is None:
                raise _prompt_changes_error(prompt, full_text)
            rest = continuation
        if called_names(answer):
            return self._answer_with_calls(context, turn, inputs, prompt, rest)
        body, tail = self._split_body(context, turn, inputs, rest, content)
        printed_form = next((form for form in _whitespace_forms(content) if body.endswith(form)), None)
        if printed_form is None and reasoning_text is None:
            raise DataError(f"the chat template does not print the answer {content!r:.50} as it stands")
        wrapper = body[: len(body) - len(printed_form or "")]
        if reasoning_text is not None and (printed_form is None or reasoning_text.strip() not in wrapper):
            return self._answer_as_generated(context, turn, inputs, prompt, open_marks, reasoning_text, content)
        if open_marks is not None and not closes_reasoning(wrapper, open_marks[1]) and not answer.truncated:
            if not (reasoning_text or "").strip():
                raise _missing_reasoning_error(open_marks)
            return self._answer_as_generated(context, turn, inputs, prompt, open_marks, reasoning_text or "", content)
        end, space = ("", "") if answer.truncated and answer.content else self._split_end(tail)
        return RenderedAnswer(prompt=prompt, body=body, content=printed_form or "", end=end, space=space)

    def _text_after_last_turn(
        self, context: Turns, turn: Message, inputs: TemplateInputs, prompt: str, full_text: str
    ) -> str | None:
        """The text after the last turn, for a template that changes earlier turns when an answer follows.

        The last turn's text, and all that the prompt has after it, must stand unchanged before the answer, so that the
        answer follows them as it follows the prompt. None if they do not.
        """
        last_content = context[-1].content.strip()
        start = prompt.rfind(last_content) if last_content else -1
        marked_turn = drop_fields(dataclasses.replace(turn, content=SENTINEL), CALL_FIELDS)
        head = self.template.render((*context, marked_turn), inputs=inputs, answer_next=False).partition(SENTINEL)[0]
        stop = head.rfind(prompt[start:]) if start >= 0 and full_text.startswith(head) else -1
        return full_text[stop + len(prompt) - start :] if stop >= 0 else None

    def as_generated(
        self, turns: Turns, answer: Message, *, inputs: TemplateInputs = NO_INPUTS, prompt: str
    ) -> RenderedAnswer:
        """An answer after the prompt with the text that a model wrote, even if the template would change that text.

        Raises:
            DataError: the template refuses these messages.
        """
        self.template.render((*turns, answer), inputs=inputs, answer_next=False)
        tail = self._find_tail(turns, answer, inputs)
        is_cut = tail is None or (answer.truncated and answer.content)
        end, space = ("", "") if is_cut else self._split_end(tail or "")
        return RenderedAnswer(prompt=prompt, body=answer.content, content=answer.content, end=end, space=space)

    def conversation(
        self, turns: Turns, answer_indices: Sequence[int], *, inputs: TemplateInputs = NO_INPUTS, continues_answer: bool
    ) -> RenderedConversation | None:
        """All answers in one rendering, if each stands there after exactly the prompt that generation would use.

        For every answer, the rendered turns before it must be the beginning of the whole text; the answer must follow,
        and then the same end as if it were the last answer. An empty reasoning that the template writes only before the
        last answer may be missing before the others. Templates that leave out earlier reasoning, move the system text
        or end the last turn in another way need one example per answer.

        Args:
            answer_indices: indices of the turns that are trained on.
            continues_answer: the first of them continues the turn before it.

        Returns:
            The conversation; None if it needs one example per answer.

        Raises:
            DataError: the last answer cannot be found.
        """
        *earlier_indices, last_index = answer_indices
        continues_turn = continues_answer and not earlier_indices
        last_prompt = self.prompt(turns[:last_index], inputs=inputs, continues_answer=continues_turn)
        last_answer = self.answer(
            turns[:last_index], turns[last_index], inputs=inputs, prompt=last_prompt, continues_answer=continues_turn
        )
        if earlier_indices and last_answer.end and not self.control.find(last_answer.end):
            return None  # the earlier answers would have no end token
        text, spans = last_answer.text, []
        for index in earlier_indices:
            continues_turn = continues_answer and index == answer_indices[0]
            prompt = self.prompt(turns[:index], inputs=inputs, continues_answer=continues_turn)
            stop = self._answer_stop(text, prompt, turns[: index + 1], last_answer, inputs, continues_turn)
            if stop is None:
                return None
            spans.append((len(prompt), stop))
        first_prompt = text[: spans[0][0]] if spans else last_prompt
        return RenderedConversation(text=text, prompt=first_prompt, spans=(*spans, last_answer.span))

    def _answer_stop(
        self,
        text: str,
        prompt: str,
        turns: Turns,
        last_answer: RenderedAnswer,
        inputs: TemplateInputs,
        continues_answer: bool,
    ) -> int | None:
        """Where the last of `turns`, which is an answer, ends in the whole text; None if it is not found there."""
        if not text.startswith(prompt):
            return None
        turn, start = turns[-1], len(prompt)
        if (
            last_answer.end
            and not turn.truncated
            and not called_names(turn)
            and split_reasoning(turn)[0] is None
            and not continues_answer
        ):
            for form in _whitespace_forms(turn.content):  # the common case, which needs no rendering
                if text.startswith(form + last_answer.end, start) and not open_reasoning_marks(prompt):
                    return start + len(form + last_answer.end)
        answer = self.answer(turns[:-1], turn, inputs=inputs, prompt=prompt, continues_answer=continues_answer)
        wrapper = answer.body[: len(answer.body) - len(answer.content)]
        if text.startswith(answer.body, start):
            stop = start + len(answer.body)
        elif is_empty_reasoning(wrapper) and text.startswith(answer.content, start):
            stop = start + len(answer.content)
        else:
            return None
        if turn.truncated:
            return stop
        end = answer.end or next((end for end in self.end_texts if text.startswith(end, stop)), "")
        if not text.startswith(end, stop) or not self.control.find(end):
            return None
        return stop + len(end)

    def _split_body(
        self, context: Turns, turn: Message, inputs: TemplateInputs, rest: str, content: str
    ) -> tuple[str, str]:
        """Divides `rest`, the text after the prompt, into the answer and what the template writes after an answer.

        Raises:
            DataError: the template does not print the answer unchanged.
        """
        forms = _whitespace_forms(content)
        for tail in sorted(self._tails, key=len, reverse=True):
            body = rest[: len(rest) - len(tail)]
            if rest.endswith(tail) and body.endswith(forms):
                return body, tail
        new_tail = self._find_tail(context, turn, inputs)
        if new_tail is None or not rest.endswith(new_tail):
            raise DataError(f"the chat template does not print the answer {content!r:.50} as it stands")
        if len(self._tails) >= MAX_TAILS:
            self._tails.clear()
        self._tails[new_tail] = None
        return rest[: len(rest) - len(new_tail)], new_tail

    def _find_tail(self, context: Turns, turn: Message, inputs: TemplateInputs) -> str | None:
        """The text that the template writes after an answer; None if it does not print answers."""
        marked_turn = drop_fields(dataclasses.replace(turn, content=SENTINEL), CALL_FIELDS)
        _, separator, tail = self.template.render((*context, marked_turn), inputs=inputs, answer_next=False).rpartition(
            SENTINEL
        )
        return tail if separator else None

    def _split_end(self, tail: str) -> tuple[str, str]:
        """The tail up to and including its first end token, and the white space after that; all of it without one."""
        stop = min((tail.index(end) + len(end) for end in self.end_texts if end in tail), default=len(tail))
        return tail[:stop], tail[stop : len(tail) - len(tail[stop:].lstrip())]

    def _answer_with_calls(
        self, context: Turns, turn: Message, inputs: TemplateInputs, prompt: str, rest: str
    ) -> RenderedAnswer:
        content = turn.content.strip()
        stop = rest.find(content) + len(content) if content else 0
        reasoning_text, _ = split_reasoning(turn)
        is_lost = self.template.renders_equally(
            (*context, turn), inputs, (*context, drop_fields(turn, CALL_FIELDS)), inputs, answer_next=False
        )
        if is_lost or content not in rest or not all(name in rest for name in called_names(turn)):
            raise lost_calls_error()
        self.template.check_arguments((*context, turn), inputs, answer_next=False)
        if reasoning_text is not None and reasoning_text.strip() not in rest:
            raise _lost_reasoning_error(reasoning_text)
        end_stops = [rest.index(end, stop) + len(end) for end in self.end_texts if end in rest[stop:]]
        if not end_stops:
            return RenderedAnswer(prompt=prompt, body=rest, content=rest, end="")
        body_stop = max(start for end in self.end_texts if (start := rest.find(end, stop, min(end_stops))) >= 0)
        body, tail = rest[:body_stop], rest[body_stop:]
        end, space = ("", "") if turn.truncated else self._split_end(tail)
        return RenderedAnswer(prompt=prompt, body=body, content=body, end=end, space=space)

    def _answer_as_generated(
        self,
        context: Turns,
        turn: Message,
        inputs: TemplateInputs,
        prompt: str,
        open_marks: tuple[str, str] | None,
        reasoning_text: str,
        content: str,
    ) -> RenderedAnswer:
        """An answer whose reasoning the template does not print, written as a model would generate it.

        Raises:
            DataError: the answer has calls, or the marks of the reasoning are not known.
        """
        marks = open_marks or next((pair for pair in REASONING_MARKS if pair[1] in turn.content), None)
        if marks is None or called_names(turn):
            raise _lost_reasoning_error(reasoning_text)
        if marks[1] in turn.content:  # the text is as the model writes it, but for the mark that the prompt ends with
            body = turn.content
            if open_marks is not None and body.lstrip().startswith(open_marks[0].strip()):
                body = body.lstrip()[len(open_marks[0].strip()) :].lstrip("\n")
        else:
            body = f"{reasoning_text.strip()}\n{marks[1]}\n\n{content}"
        tail = self._find_tail(context, turn, inputs)
        end, space = ("", "") if turn.truncated or tail is None else self._split_end(tail)
        return RenderedAnswer(prompt=prompt, body=body, content=body, end=end, space=space)


def _whitespace_forms(content: str) -> tuple[str, ...]:
    """The forms in which templates print a text: unchanged, or without white space at an end."""
    return content, content.lstrip(), content.rstrip(), content.strip()


def _prompt_changes_error(prompt: str, full_text: str) -> DataError:
    common = next(
        (i for i, pair in enumerate(zip(prompt, full_text, strict=False)) if pair[0] != pair[1]), len(full_text)
    )
    prompt_rest = prompt[common:]
    return DataError(
        f"the text of the prompt changes when an answer follows ({len(prompt_rest)} of its last characters differ: "
        f"generation has {prompt_rest!r:.60}, a given answer {full_text[common:]!r:.60}), so training would see "
        "another prompt than is asked later; take another model.chat_template, or set model.chat_template_kwargs"
    )


def _missing_reasoning_error(open_marks: tuple[str, str]) -> DataError:
    return DataError(
        f"the chat template's prompt opens a thought ({open_marks[0].strip()}), and the answer has none, so training "
        "would see another prompt than is asked later, or teach not to think; give the answers a reasoning_content, or "
        "take a prompt without it, as by model.chat_template_kwargs: {enable_thinking: false} if the template knows "
        "that"
    )


def _lost_reasoning_error(reasoning_text: str) -> DataError:
    return DataError(
        f"the chat template does not print the answer's reasoning ({reasoning_text.strip()!r:.50}), so the model would "
        "learn not to think; take a model.chat_template that does, or leave the reasoning out of the data"
    )
