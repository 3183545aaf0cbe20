"""Turns text into token ids: the border between prompt and completion, what is trained on, end tokens, truncation."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from alignment.data.borders import encode_after, encode_with_borders
from alignment.data.chat_templates import DATE_OF_RUN, ChatTemplate, TemplateInputs
from alignment.data.control_tokens import ControlTokens, Encoding, Span
from alignment.data.prompt_check import PromptCheck
from alignment.data.rendering import RenderedAnswer, Renderer
from alignment.errors import DataError
from alignment.groups import Completion, Group, Message
from alignment.settings.data import DataConfig


class GroupTokenizer:
    """Computes the token ids of groups.

    The prompt has exactly the tokens that it has alone, as generation reads it, even where the tokenizer would merge
    its end with the beginning of an answer (see `alignment.data.borders`). All completions of a group share these
    tokens. The tokens that are trained on are those of each answer, as the template writes it after that prompt, with
    its end token.

    A conversation with several answers becomes one example, if one rendering holds every answer after exactly the
    prompt that generation uses, with the same end as the last answer. Otherwise it becomes one example per answer (see
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
        """Makes a tokenizer of groups.

        Args:
            end_tokens: token ids that end an answer; a completion without one gets the tokenizer's EOS token.
            date: the date that templates print as today's; None is the date of this process's run, or today.
            checks_answers: refuse an answer if the template drops a part of it. With False, such an answer is used as
                its model wrote it; this is for answers that are only scored.

        Raises:
            DataError: the tokenizer is not a fast one.
        """
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} is not a fast tokenizer; character offsets are needed")
        self.tokenizer = tokenizer
        self.data = data
        self.end_tokens = end_tokens
        ids: list[int] = tokenizer("a")["input_ids"]
        self.ends_by_itself = ids[-1:] == [tokenizer.eos_token_id]
        self.control = ControlTokens(tokenizer)
        # The text of an id that the tokenizer does not have is empty.
        end_texts = frozenset(tokenizer.decode([index]) for index in end_tokens) - {""}
        self.template = ChatTemplate(tokenizer, date or DATE_OF_RUN.get() or datetime.date.today())
        self.prompt_check = PromptCheck(self.template)
        self.renderer = Renderer(self.template, self.control, end_texts)
        self.checks_answers = checks_answers
        self.num_with_control = 0
        """Number of groups so far whose texts hold control tokens."""
        self.num_split_conversations = 0
        """Number of conversations so far that became one example per answer."""

    def __call__(self, group: Group) -> Group:
        """Returns the group with token ids.

        Raises:
            DataError: the prompt fills the window, no token is left to train on, the prompt is a list of messages and
                the tokenizer has no chat template, the template drops a part of the row, or the group needs several
                examples (see `examples`).
        """
        groups = self.examples(group)
        if len(groups) > 1:
            raise DataError(
                "the chat template writes earlier answers otherwise than the last one, so this conversation needs "
                f"{len(groups)} examples, one per answer"
            )
        return groups[0]

    def examples(self, group: Group) -> list[Group]:
        """Returns the group with token ids; several groups if a conversation needs one for each of its answers.

        Raises:
            DataError: the group cannot be tokenised, for the reasons that `__call__` names.
        """
        if self.data.train_on_prompt and group.completions and not all(turn.trained for turn in _all_turns(group)):
            raise DataError(
                "a message has a weight of 0, and data.train_on_prompt learns every token; set it to false, or take "
                "the weight out of the message"
            )
        shielded_group = self._shield_group(group)
        if isinstance(shielded_group.prompt, str):
            return [self._fill_tokens(group, self._text_layout(shielded_group))]
        if not any(completion.following for completion in group.completions):
            return [self._fill_tokens(group, self._chat_layout(shielded_group))]
        layout = self._conversation_layout(shielded_group)
        if layout is not None:
            return [self._fill_tokens(group, layout)]
        self.num_split_conversations += 1
        tokenised_examples: list[Group] = []
        for example, shielded_example in zip(_split_by_answer(group), _split_by_answer(shielded_group), strict=True):
            try:
                tokenised_examples.append(self._fill_tokens(example, self._chat_layout(shielded_example)))
            except _PromptTooLong:
                if not tokenised_examples:
                    raise
                break  # a long conversation that is one example loses its end in the same way
        return tokenised_examples

    def summary(self) -> str:
        """Notes for people about the rows that were read; empty if there are none."""
        notes = []
        if self.num_with_control:
            interpretation = "read as such" if self.data.control_tokens == "control" else "read as text in messages"
            notes.append(f"{self.num_with_control} with control tokens in their texts, {interpretation}")
        if self.num_split_conversations:
            notes.append(f"{self.num_split_conversations} conversations learned as one example per answer")
        if self.prompt_check.unread_fields:
            names = ", ".join(sorted(self.prompt_check.unread_fields))
            notes.append(f"fields that the chat template does not read: {names}")
        return "; ".join(notes)

    def render(self, turns: tuple[Message, ...], *, answer_next: bool) -> str:
        """The turns as the chat template writes them; with `answer_next`, the text ends where an answer would begin.

        Raises:
            DataError: there is no chat template, or it refuses these messages.
        """
        return self.template.render(turns, answer_next=answer_next)

    def _shield_group(self, group: Group) -> Group:
        """The group with its control tokens shielded, if they are to be read as text; counts groups that have some."""
        turns = [*_turns(group.prompt)]
        for completion in group.completions:
            turns += [_turn(completion), *completion.following]
        other_values = [*(turn.fields for turn in turns if turn.fields), *group.tools]
        if not (
            any(self.control.holds(turn.content, role=turn.role) for turn in turns)
            or any(self.control.holds(turn.role) for turn in turns if not turn.role.isidentifier())
            or any(self.control.holds(text) for value in other_values for text in _texts(value))
        ):
            return group
        self.num_with_control += 1
        as_text = self.data.control_tokens == "text" or not isinstance(group.prompt, str)
        if self.data.control_tokens == "control" or not as_text:
            return group
        shield, shield_role = self.control.shield, self.control.shield_role

        def shield_turn(turn: Message) -> Message:
            content, fields = shield(turn.content, role=turn.role), shield(turn.fields, role=turn.role)
            return dataclasses.replace(turn, role=shield_role(turn.role), content=content, fields=fields)

        return dataclasses.replace(
            group,
            prompt=shield(group.prompt) if isinstance(group.prompt, str) else tuple(map(shield_turn, group.prompt)),
            completions=tuple(
                dataclasses.replace(
                    completion,
                    text=shield(completion.text, role="assistant"),
                    fields=shield(completion.fields, role="assistant"),
                    following=tuple(map(shield_turn, completion.following)),
                )
                for completion in group.completions
            ),
            tools=tuple(shield(tool) for tool in group.tools),
        )

    def _text_layout(self, group: Group) -> _Layout:
        assert isinstance(group.prompt, str)
        prompt = self._encode_text(group.prompt)
        sequences = []
        for completion in group.completions:
            ids = self._encode_text(group.prompt + completion.text)
            if group.prompt and not self.data.train_on_prompt and ids[: len(prompt)] != prompt:
                ids = prompt + encode_after(self.control, prompt, completion.text, ids).ids
            sequences.append((ids, [True] * len(ids)))
        return _Layout(prompt=prompt, sequences=sequences)

    def _chat_layout(self, group: Group) -> _Layout:
        """The layout of a chat in which every completion is the turn after the prompt, or continues its last turn."""
        assert not isinstance(group.prompt, str)
        continues_answer = _continues_answer(group.prompt)
        prompt = self.renderer.prompt(group.prompt, inputs=_inputs(group), continues_answer=continues_answer)
        self.prompt_check.check(prompt, group.prompt, _inputs(group))
        sequences = []
        prompt_encoding = self.control.encode(prompt)
        for completion in group.completions:
            answer = self._answer(group, completion, prompt, continues_answer)
            sequences.append(self._encode_answers(answer.text, [answer.span], prompt_encoding))
        return self._layout(prompt, prompt_encoding, group, sequences)

    def _encode_answers(self, text: str, spans: Sequence[Span], prompt: Encoding) -> tuple[list[int], list[bool]]:
        """Token ids of a rendered text, and their loss mask.

        Args:
            spans: start and stop (characters) of each answer that is trained on.
            prompt: the tokens of the text before the first answer.
        """
        if self.data.train_on_prompt:  # every token is trained on, so no token must end where an answer begins
            ids = self.control.encode(text).ids
            return ids, [True] * len(ids)
        text_encoding = encode_with_borders(self.control, text, [start for start, _ in spans], prompt)
        encoding, first_tokens = text_encoding.encoding, text_encoding.first_tokens
        answer_ranges = [(first_token, stop) for first_token, (_, stop) in zip(first_tokens, spans, strict=True)]
        # A token's span may be empty, because some tokenizers leave white space out of it.
        loss_mask = [
            any(index >= first_token and start < stop for first_token, stop in answer_ranges)
            for index, (start, _) in enumerate(encoding.spans)
        ]
        return encoding.ids, loss_mask

    def _answer(self, group: Group, completion: Completion, prompt: str, continues_answer: bool) -> RenderedAnswer:
        assert not isinstance(group.prompt, str)
        turn = _turn(completion)
        self.prompt_check.count_unread_fields(turn)
        try:
            return self.renderer.answer(
                group.prompt, turn, inputs=_inputs(group), prompt=prompt, continues_answer=continues_answer
            )
        except DataError:
            if self.checks_answers:
                raise
            return self.renderer.as_generated(group.prompt, turn, inputs=_inputs(group), prompt=prompt)

    def _conversation_layout(self, group: Group) -> _Layout | None:
        """The layout of a conversation with all its answers in one text; None if it needs one example per answer."""
        assert not isinstance(group.prompt, str)
        if len(group.completions) != 1:
            raise DataError("a conversation of several answers needs exactly one completion")
        (completion,) = group.completions
        turns = (*group.prompt, _turn(completion), *completion.following)
        answer_indices = _answer_indices(turns, len(group.prompt))
        continues_answer = _continues_answer(group.prompt)
        if self.data.train_on_prompt:  # every token is trained on, so the positions of the answers do not matter
            answer_indices = answer_indices[-1:]
            continues_answer = continues_answer and len(answer_indices) == 1
        for index in answer_indices:
            self.prompt_check.count_unread_fields(turns[index])
        conversation = self.renderer.conversation(
            turns, answer_indices, inputs=_inputs(group), continues_answer=continues_answer
        )
        if conversation is None:
            return None
        context = turns[: answer_indices[-1]]
        self.prompt_check.check(conversation.text, context, _inputs(group))
        prompt_encoding = self.control.encode(conversation.prompt)
        sequence = self._encode_answers(conversation.text, conversation.spans, prompt_encoding)
        return self._layout(conversation.prompt, prompt_encoding, group, [sequence])

    def _layout(
        self, prompt: str, encoding: Encoding, group: Group, sequences: list[tuple[list[int], list[bool]]]
    ) -> _Layout:
        limit = self.data.max_prompt_length
        is_too_long = limit is not None and len(encoding.ids) > limit
        cut_mask = self._cut_mask(prompt, group, encoding.spans) if is_too_long else None
        return _Layout(prompt=encoding.ids, sequences=sequences, cut_mask=cut_mask)

    def _cut_mask(self, prompt: str, group: Group, spans: list[Span]) -> list[bool]:
        """For each token of a rendered prompt, whether it may be cut: it must be text of a user or of a tool.

        Raises:
            DataError: the template does not print these texts unchanged.
        """
        assert not isinstance(group.prompt, str)
        text_spans = self.renderer.find_texts(prompt, group.prompt, inputs=_inputs(group), roles=("user", "tool"))
        return [any(start >= begin and begin < stop <= end for begin, end in text_spans) for start, stop in spans]

    def _fill_tokens(self, group: Group, layout: _Layout) -> Group:
        prompt, sequences = layout.prompt, layout.sequences
        border = len(prompt)
        if self.data.train_on_prompt or not prompt:
            if len(sequences) != 1:
                raise DataError("an empty prompt, or train_on_prompt, needs exactly one completion")
            prompt, border = sequences[0][0][:1], 1
        completions = [
            (ids[border:], loss_mask[border:], completion)
            for (ids, loss_mask), completion in zip(sequences, group.completions, strict=True)
        ]
        prompt = self._cut_prompt(prompt, layout.cut_mask)
        max_tokens = self.data.max_length - len(prompt)
        return dataclasses.replace(
            group,
            prompt_tokens=tuple(prompt),
            completions=tuple(
                self._finish_completion(ids, loss_mask, completion, max_tokens)
                for ids, loss_mask, completion in completions
            ),
        )

    def _encode_text(self, text: str) -> list[int]:
        """Token ids with the BOS token that the tokenizer adds, and without the end token that some tokenizers add."""
        if self.control.is_shielded(text):
            return self._bos_tokens() + self.control.encode(text).ids
        ids: list[int] = self.tokenizer(text)["input_ids"]
        has_two_bos = ids[:2] == [self.tokenizer.bos_token_id] * 2  # the text begins with a BOS token itself
        return ids[int(has_two_bos) : len(ids) - int(self.ends_by_itself)]

    def _bos_tokens(self) -> list[int]:
        """The tokens that the tokenizer adds before every text."""
        ids: list[int] = self.tokenizer("")["input_ids"]
        return ids[: len(ids) - int(self.ends_by_itself)]

    def _cut_prompt(self, prompt: list[int], cut_mask: list[bool] | None) -> list[int]:
        """The prompt cut to at most `max_prompt_length` tokens. Its BOS token stays; of messages, only text is cut.

        Raises:
            DataError: too few of its tokens may be cut, or it fills the window.
        """
        limit = self.data.max_prompt_length
        if limit is not None and len(prompt) > limit:
            excess = len(prompt) - limit
            keeps_end = self.data.truncate_prompt == "keep_end"
            if cut_mask is not None:
                indices = [index for index in range(len(prompt)) if cut_mask[index]]
                if excess >= len(indices):
                    raise DataError(
                        f"the prompt ({len(prompt)} tokens) is longer than data.max_prompt_length ({limit}), and only "
                        f"{len(indices)} of its tokens are a user's text, which could be cut"
                    )
                cut_indices = set(indices[:excess] if keeps_end else indices[-excess:])
                prompt = [token for index, token in enumerate(prompt) if index not in cut_indices]
            elif not keeps_end:
                prompt = prompt[:limit]
            else:
                num_kept = int(limit > 1 and prompt[0] == self.tokenizer.bos_token_id)
                prompt = prompt[:num_kept] + prompt[len(prompt) - limit + num_kept :]
        if len(prompt) >= self.data.max_length:
            raise _PromptTooLong(
                f"the prompt ({len(prompt)} tokens) fills the window (data.max_length {self.data.max_length})"
            )
        return prompt

    def _finish_completion(
        self, ids: list[int], loss_mask: list[bool], completion: Completion, max_tokens: int
    ) -> Completion:
        """The completion with its tokens: with an end token unless the answer was cut off, and at most `max_tokens`."""
        is_cut = _is_cut(completion)
        end = len(ids) if is_cut else self._end_length(ids)
        if end is None:
            ids, loss_mask = [*ids, self.tokenizer.eos_token_id], [*loss_mask, True]
            end = len(ids)
        if not any(loss_mask[:max_tokens]):
            raise DataError("no token of the answer is left to learn")
        return dataclasses.replace(
            completion,
            tokens=tuple(ids[:max_tokens]),
            loss_mask=tuple(loss_mask[:max_tokens]),
            truncated=end > max_tokens or is_cut,
        )

    def _end_length(self, ids: list[int]) -> int | None:
        """Number of tokens up to and including the end token, which only white space may follow; None without one."""
        for length in range(len(ids), 0, -1):
            if ids[length - 1] in self.end_tokens:
                return length
            if self.tokenizer.decode(ids[length - 1]).strip():
                break
        return None


class _PromptTooLong(DataError):
    """The prompt fills the window, so that no token is left for an answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layout:
    """The tokens of a group before they are divided into prompt and completions."""

    prompt: list[int]
    """Token ids of the prompt alone, as generation uses them."""
    sequences: list[tuple[list[int], list[bool]]]
    """For each completion, token ids that begin with those of the prompt (but with `train_on_prompt`, where they are
    those of the whole text), and their loss mask."""
    cut_mask: list[bool] | None = None
    """For each token of the prompt, whether it may be cut; None if nothing must be cut, or the prompt is plain text."""


def _continues_answer(prompt: tuple[Message, ...]) -> bool:
    """True if a prompt ends with an answer that is to be continued. An answer that is marked as context is complete."""
    return prompt[-1].role == "assistant" and prompt[-1].trained


def _all_turns(group: Group) -> Iterator[Message]:
    """Yields the turns of the prompt, and those that follow an answer."""
    yield from group.prompt if not isinstance(group.prompt, str) else ()
    for completion in group.completions:
        yield from completion.following


def _inputs(group: Group) -> TemplateInputs:
    return TemplateInputs(tools=group.tools, kwargs=group.chat_template_kwargs)


def _turns(prompt: str | tuple[Message, ...]) -> tuple[Message, ...]:
    return (Message(role="user", content=prompt),) if isinstance(prompt, str) else prompt


def _turn(completion: Completion) -> Message:
    return Message(role="assistant", content=completion.text, fields=completion.fields, truncated=completion.truncated)


def _answer_indices(turns: tuple[Message, ...], first_index: int) -> list[int]:
    """Indices, from `first_index` on, of the assistant's turns that are trained on."""
    indices = range(first_index, len(turns))
    return [index for index in indices if turns[index].role == "assistant" and turns[index].trained]


def _is_cut(completion: Completion) -> bool:
    """True if the last answer of a completion was cut off when it was sampled, and is not empty."""
    last_answer = next((turn for turn in reversed(completion.following) if turn.role == "assistant"), _turn(completion))
    return last_answer.truncated and bool(last_answer.content)


def _split_by_answer(group: Group) -> list[Group]:
    """One group for each answer of a conversation, with all turns before the answer as the prompt."""
    assert not isinstance(group.prompt, str)
    (completion,) = group.completions
    turns = (*group.prompt, _turn(completion), *completion.following)
    groups = []
    for index in _answer_indices(turns, len(group.prompt)):
        context = turns[:index]
        if index > len(group.prompt) and context[-1].role == "assistant":
            context = (*context[:-1], dataclasses.replace(context[-1], trained=False))  # it is complete
        answer = turns[index]
        answer_completion = dataclasses.replace(
            completion, text=answer.content, fields=answer.fields, truncated=answer.truncated, following=()
        )
        groups.append(dataclasses.replace(group, prompt=context, completions=(answer_completion,)))
    return groups


def _texts(value: Any) -> Iterator[str]:
    """Yields every text in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
