"""Text to token ids: chat templates, the border between prompt and completion, end tokens and truncation."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from alignment.data.control_tokens import ControlTokens, Span
from alignment.data.rendering import Answer, Renderer, TemplateInputs
from alignment.errors import ConfigError, DataError
from alignment.groups import Completion, Group, Message
from alignment.settings.data import DataConfig

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""  # noqa: E501
ZEPHYR = """{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""  # noqa: E501
CHAT_TEMPLATES = {"chatml": CHATML, "zephyr": ZEPHYR}


def chat_template(name: str | None, named: Mapping[str, str] | None = None) -> str | None:
    """Resolves `model.chat_template`: the name of one of the tokenizer's several, a known name, a path, or Jinja text.

    Args:
        named: the tokenizer's templates, if it has several.

    Raises:
        ConfigError: it is none of these.
    """
    if name is None:
        return None
    if name in (known := {**CHAT_TEMPLATES, **(named or {})}):
        return known[name]
    if "{%" in name or "{{" in name:
        return name
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    raise ConfigError(
        f"model.chat_template {name!r} is neither a known name ({', '.join(CHAT_TEMPLATES)}) nor a file nor Jinja text"
    )


def with_kwargs(template: str, kwargs: Mapping[str, Any]) -> str:
    """A chat template that has `model.chat_template_kwargs` as defaults; a caller's own values win.

    Raises:
        ConfigError: the template never mentions one of them.
    """
    for name in kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ConfigError(
                f"model.chat_template_kwargs: the chat template knows no {name!r}, so it would do nothing"
            )
    defaults = (
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in kwargs.items()
    )
    return "".join(defaults) + template


def _literal(value: Any) -> str:
    """A value of YAML in Jinja's words, which are those of JSON but for null."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


DATE_OF_RUN: ContextVar[datetime.date | None] = ContextVar("DATE_OF_RUN", default=None)
"""The date that templates print in this process, for scorers too, which nobody tells the run's folder."""
DATE_FILE = "date"
"""In a run's folder: the day on which it began, for templates that print today's date."""


def run_date(folder: Path) -> datetime.date:
    """The date of a run: the one that its folder keeps, or today, which it keeps from now on.

    Templates that print the date print this one on every day of the run, so that its prompts stay the same.
    """
    file = folder / DATE_FILE
    if file.is_file():
        return datetime.date.fromisoformat(file.read_text(encoding="utf-8").strip())
    today = datetime.date.today()
    part = file.with_suffix(".part")
    part.write_text(f"{today.isoformat()}\n", encoding="utf-8")
    part.replace(file)
    return today


class GroupTokenizer:
    """Fills in the token ids of groups, by one set of rules.

    The border between prompt and completion is found in the tokens of the whole text, so that a merge across it is
    seen as the model will see it. All completions of a group share the prompt's tokens. The prompt of messages is the
    one that generation has; what is learned is each answer as the template writes it behind that prompt, with the end
    token and the white space behind it.

    A conversation of several answers is one example if its one rendering holds each answer behind exactly the prompt
    that generation has, ended as the last one is; else it becomes one example per answer (see
    `Renderer.conversation`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        data: DataConfig,
        end_tokens: frozenset[int],
        *,
        date: datetime.date | None = None,
        checks_answers: bool = True,
    ) -> None:
        """`end_tokens` are ids that end an answer; the first completion without one gets the tokenizer's own.

        Args:
            date: what templates that print today's date print; None is the date of this process's run, or today.
            checks_answers: refuse an answer of which the template drops a part. False takes it as its model wrote it,
                for answers that are only scored.
        """
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} is not a fast tokenizer; character offsets are needed")
        self.tokenizer = tokenizer
        self.data = data
        self.end_tokens = end_tokens
        ids: list[int] = tokenizer("a")["input_ids"]
        self.ends_by_itself = ids[-1:] == [tokenizer.eos_token_id]
        self.control = ControlTokens(tokenizer)
        end_texts = frozenset(tokenizer.decode([index]) for index in end_tokens) - {""}  # of an id that it has not
        self.renderer = Renderer(tokenizer, self.control, end_texts, date or DATE_OF_RUN.get() or datetime.date.today())
        self.checks_answers = checks_answers
        self.num_with_control = 0
        """Groups seen whose texts hold control tokens."""
        self.num_divided = 0
        """Conversations seen that became one example per answer."""

    def __call__(self, group: Group) -> Group:
        """Returns the group with token ids.

        Raises:
            DataError: the prompt fills the window, no token is left to learn, a message list meets a tokenizer
                without a chat template, the template drops a part of the row, or one group is not enough (`examples`).
        """
        groups = self.examples(group)
        if len(groups) > 1:
            raise DataError(
                "the chat template writes earlier answers otherwise than the last one, so this conversation needs "
                f"{len(groups)} examples, one per answer"
            )
        return groups[0]

    def examples(self, group: Group) -> list[Group]:
        """The group with token ids; several if a conversation needs one for each of its answers.

        Raises:
            DataError: as for a call.
        """
        shielded = self._shielded(group)
        if isinstance(shielded.prompt, str):
            return [self._filled(group, self._text_layout(shielded))]
        if not any(completion.following for completion in group.completions):
            return [self._filled(group, self._chat_layout(shielded))]
        layout = self._conversation_layout(shielded)
        if layout is not None:
            return [self._filled(group, layout)]
        self.num_divided += 1
        examples: list[Group] = []
        for part, shielded_part in zip(_divided(group), _divided(shielded), strict=True):
            try:
                examples.append(self._filled(part, self._chat_layout(shielded_part)))
            except _WindowIsFull:
                if not examples:
                    raise
                break  # as the end of a long conversation is cut where it is one example
        return examples

    def summary(self) -> str:
        """What people should know of the rows that were read; empty if there is nothing."""
        notes = []
        if self.num_with_control:
            how = "read as such" if self.data.control_tokens == "control" else "read as text in messages"
            notes.append(f"{self.num_with_control} with control tokens in their texts, {how}")
        if self.num_divided:
            notes.append(f"{self.num_divided} conversations learned as one example per answer")
        if self.renderer.unread_fields:
            names = ", ".join(sorted(self.renderer.unread_fields))
            notes.append(f"fields that the chat template does not read: {names}")
        return "; ".join(notes)

    def render(self, turns: tuple[Message, ...], *, answer_next: bool) -> str:
        """The turns through the chat template, ending where an answer would begin if `answer_next`."""
        return self.renderer.render(turns, answer_next=answer_next)

    def _shielded(self, group: Group) -> Group:
        """The group with control tokens in its texts shielded, if these are to be read as text; counts it."""
        turns = [*_turns(group.prompt)]
        for completion in group.completions:
            turns += [_turn(completion), *completion.following]
        others = (value for values in ([turn.fields for turn in turns if turn.fields], group.tools) for value in values)
        if not (
            any(self.control.holds(turn.content, role=turn.role) for turn in turns)
            or any(self.control.holds(turn.role) for turn in turns if not turn.role.isidentifier())
            or any(self.control.holds(text) for value in others for text in _texts(value))
        ):
            return group
        self.num_with_control += 1
        as_text = self.data.control_tokens == "text" or not isinstance(group.prompt, str)
        if self.data.control_tokens == "control" or not as_text:
            return group
        shield, shield_role = self.control.shield, self.control.shield_role

        def shielded(turn: Message) -> Message:
            content, fields = shield(turn.content, role=turn.role), shield(turn.fields, role=turn.role)
            return dataclasses.replace(turn, role=shield_role(turn.role), content=content, fields=fields)

        return dataclasses.replace(
            group,
            prompt=shield(group.prompt) if isinstance(group.prompt, str) else tuple(map(shielded, group.prompt)),
            completions=tuple(
                dataclasses.replace(
                    completion,
                    text=shield(completion.text, role="assistant"),
                    fields=shield(completion.fields, role="assistant"),
                    following=tuple(map(shielded, completion.following)),
                )
                for completion in group.completions
            ),
            tools=tuple(shield(tool) for tool in group.tools),
        )

    def _text_layout(self, group: Group) -> _Layout:
        assert isinstance(group.prompt, str)
        wholes = [self._plain(group.prompt + completion.text) for completion in group.completions]
        return _Layout(prompt=self._plain(group.prompt), wholes=[(ids, [True] * len(ids)) for ids in wholes])

    def _chat_layout(self, group: Group) -> _Layout:
        """Every completion is the next turn after the prompt, or goes on with its last one."""
        assert not isinstance(group.prompt, str)
        begun = _is_begun(group.prompt)
        prompt = self.renderer.prompt(group.prompt, inputs=_inputs(group), begun=begun)
        self.renderer.check_prompt(prompt, group.prompt, _inputs(group))
        wholes = []
        for completion in group.completions:
            answer = self._answer(group, completion, prompt, begun)
            encoding = self.control.encode(answer.text)
            _, answer_stop = answer.span
            wholes.append((encoding.ids, [start < answer_stop for start, _ in encoding.spans]))
        return self._layout(prompt, group, wholes)

    def _answer(self, group: Group, completion: Completion, prompt: str, begun: bool) -> Answer:
        assert not isinstance(group.prompt, str)
        try:
            answer = _turn(completion)
            return self.renderer.answer(group.prompt, answer, inputs=_inputs(group), prompt=prompt, begun=begun)
        except DataError:
            if self.checks_answers:
                raise
            return self.renderer.as_generated(group.prompt, _turn(completion), inputs=_inputs(group), prompt=prompt)

    def _conversation_layout(self, group: Group) -> _Layout | None:
        """All answers of a conversation in one text; None if its template needs one example per answer."""
        assert not isinstance(group.prompt, str)
        if len(group.completions) != 1:
            raise DataError("a conversation of several answers needs exactly one completion")
        (completion,) = group.completions
        turns = (*group.prompt, _turn(completion), *completion.following)
        answers = _answers(turns, len(group.prompt))
        begun = _is_begun(group.prompt)
        if self.data.train_on_prompt:  # every token is learned, wherever the answers are
            answers = answers[-1:]
            begun = begun and len(answers) == 1
        conversation = self.renderer.conversation(turns, answers, inputs=_inputs(group), begun=begun)
        if conversation is None:
            return None
        context = turns[: answers[-1]]
        self.renderer.check_prompt(conversation.text, context, _inputs(group))
        encoding = self.control.encode(conversation.text)
        # Spans may overlap a border (a merge over it) or be empty (some tokenizers leave white space out of them).
        learned = [
            any(start < end and stop > begin for begin, end in conversation.spans) for start, stop in encoding.spans
        ]
        return self._layout(conversation.prompt, group, [(encoding.ids, learned)])

    def _layout(self, prompt: str, group: Group, wholes: list[tuple[list[int], list[bool]]]) -> _Layout:
        encoding = self.control.encode(prompt)
        limit = self.data.max_prompt_length
        too_long = limit is not None and len(encoding.ids) > limit
        cuttable = self._cuttable(prompt, group, encoding.spans) if too_long else None
        return _Layout(prompt=encoding.ids, wholes=wholes, cuttable=cuttable)

    def _cuttable(self, prompt: str, group: Group, spans: list[Span]) -> list[bool]:
        """Which tokens of a rendered prompt are people's own text, which may be cut: never a header or the system's.

        Raises:
            DataError: the template does not print these texts as they are.
        """
        assert not isinstance(group.prompt, str)
        places = self.renderer.places(prompt, group.prompt, inputs=_inputs(group), roles=("user", "tool"))
        return [any(start >= begin and begin < stop <= end for begin, end in places) for start, stop in spans]

    def _filled(self, group: Group, layout: _Layout) -> Group:
        border = _border(layout)
        wholes = layout.wholes
        completions = [
            (ids[border:], learned[border:], completion)
            for (ids, learned), completion in zip(wholes, group.completions, strict=True)
        ]
        prompt = (wholes[0][0] if wholes else layout.prompt)[:border]
        if self.data.train_on_prompt or not prompt:
            if len(completions) != 1:
                raise DataError(
                    f"the prompt {group.prompt!r:.50} and what follows are one token together, so the border between "
                    "prompt and answers is inside of a token"
                    if layout.prompt and not self.data.train_on_prompt
                    else "an empty prompt, or train_on_prompt, needs exactly one completion"
                )
            (ids, learned, completion) = completions[0]
            whole = prompt + ids
            learned = [True] * len(whole) if self.data.train_on_prompt else learned
            prompt, completions = whole[:1], [(whole[1:], learned[1:], completion)]
        prompt = self._cut_prompt(prompt, layout.cuttable)
        room = self.data.max_length - len(prompt)
        return dataclasses.replace(
            group,
            prompt_tokens=tuple(prompt),
            completions=tuple(self._finish(ids, learned, completion, room) for ids, learned, completion in completions),
        )

    def _plain(self, text: str) -> list[int]:
        """Ids with the tokenizer's own beginning (BOS), but without an end token that some add by themselves."""
        if self.control.is_shielded(text):
            return self._beginning() + self.control.encode(text).ids
        ids: list[int] = self.tokenizer(text)["input_ids"]
        doubled = ids[:2] == [self.tokenizer.bos_token_id] * 2  # the text has already a BOS of its own
        return ids[int(doubled) : len(ids) - int(self.ends_by_itself)]

    def _beginning(self) -> list[int]:
        """What the tokenizer writes before every text by itself."""
        ids: list[int] = self.tokenizer("")["input_ids"]
        return ids[: len(ids) - int(self.ends_by_itself)]

    def _cut_prompt(self, prompt: list[int], cuttable: list[bool] | None) -> list[int]:
        """A prompt of at most `max_prompt_length`. Of plain text its beginning-of-sequence token stays, of messages
        all that is not people's own text.

        Raises:
            DataError: too little of it may be cut, or it fills the window.
        """
        limit = self.data.max_prompt_length
        if limit is not None and len(prompt) > limit:
            excess = len(prompt) - limit
            keeps_end = self.data.truncate_prompt == "keep_end"
            if cuttable is not None:
                indices = [index for index in range(len(prompt)) if cuttable[index]]
                if excess >= len(indices):
                    raise DataError(
                        f"the prompt ({len(prompt)} tokens) is longer than data.max_prompt_length ({limit}), and only "
                        f"{len(indices)} of its tokens are a user's text, which could be cut"
                    )
                removed = set(indices[:excess] if keeps_end else indices[-excess:])
                prompt = [token for index, token in enumerate(prompt) if index not in removed]
            elif not keeps_end:
                prompt = prompt[:limit]
            else:
                num_kept = int(limit > 1 and prompt[0] == self.tokenizer.bos_token_id)
                prompt = prompt[:num_kept] + prompt[len(prompt) - limit + num_kept :]
        if len(prompt) >= self.data.max_length:
            raise _WindowIsFull(
                f"the prompt ({len(prompt)} tokens) fills the window (data.max_length {self.data.max_length})"
            )
        return prompt

    def _finish(self, ids: list[int], learned: list[bool], completion: Completion, room: int) -> Completion:
        """Appends the end token where the answer ends and has none, and cuts what does not fit."""
        was_cut = _is_cut(completion)
        end = len(ids) if was_cut else self._end(ids)
        if end is None:
            ids, learned = [*ids, self.tokenizer.eos_token_id], [*learned, True]
            end = len(ids)
        if not any(learned[:room]):
            raise DataError("no token of the answer is left to learn")
        return dataclasses.replace(
            completion, tokens=tuple(ids[:room]), learned=tuple(learned[:room]), truncated=end > room or was_cut
        )

    def _end(self, ids: list[int]) -> int | None:
        """Number of tokens up to and with the end token, after which templates write at most white space."""
        for length in range(len(ids), 0, -1):
            if ids[length - 1] in self.end_tokens:
                return length
            if self.tokenizer.decode(ids[length - 1]).strip():
                break
        return None


class _WindowIsFull(DataError):
    """A prompt leaves no token for an answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layout:
    """The tokens of a group before its border is found."""

    prompt: list[int]
    """Ids of the prompt alone, as generation has them."""
    wholes: list[tuple[list[int], list[bool]]]
    """Ids of prompt and completion together, and which are learned, for each completion."""
    cuttable: list[bool] | None = None
    """Which of the prompt's tokens may be cut; None if it need not be, or is plain text."""


def _border(layout: _Layout) -> int:
    """Number of leading tokens that the prompt and every whole text have in common; their texts agree as far."""
    together = zip(layout.prompt, *(ids for ids, _ in layout.wholes), strict=False)
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, together))


def _is_begun(prompt: tuple[Message, ...]) -> bool:
    """Whether a prompt ends with an answer that is to be continued. An answer that is marked as context is over."""
    return prompt[-1].role == "assistant" and prompt[-1].trained


def _inputs(group: Group) -> TemplateInputs:
    return TemplateInputs(tools=group.tools, kwargs=group.chat_template_kwargs)


def _turns(prompt: str | tuple[Message, ...]) -> tuple[Message, ...]:
    return (Message(role="user", content=prompt),) if isinstance(prompt, str) else prompt


def _turn(completion: Completion) -> Message:
    return Message(role="assistant", content=completion.text, fields=completion.fields, truncated=completion.truncated)


def _answers(turns: tuple[Message, ...], first: int) -> list[int]:
    """Which turns from the first answer on are the assistant's and trained on."""
    indices = range(first, len(turns))
    return [index for index in indices if turns[index].role == "assistant" and turns[index].trained]


def _is_cut(completion: Completion) -> bool:
    """Whether the last answer of a completion was cut off where it was sampled; nothing at all is not cut."""
    last = next((turn for turn in reversed(completion.following) if turn.role == "assistant"), _turn(completion))
    return last.truncated and bool(last.content)


def _divided(group: Group) -> list[Group]:
    """One group per answer of a conversation, with all turns before it as the prompt."""
    assert not isinstance(group.prompt, str)
    (completion,) = group.completions
    turns = (*group.prompt, _turn(completion), *completion.following)
    parts = []
    for index in _answers(turns, len(group.prompt)):
        context = turns[:index]
        if index > len(group.prompt) and context[-1].role == "assistant":
            context = (*context[:-1], dataclasses.replace(context[-1], trained=False))  # it is over
        answer = turns[index]
        part = dataclasses.replace(
            completion, text=answer.content, fields=answer.fields, truncated=answer.truncated, following=()
        )
        parts.append(dataclasses.replace(group, prompt=context, completions=(part,)))
    return parts


def _texts(value: Any) -> Iterator[str]:
    """Every text in a nest of lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
