"""Text to token ids: chat templates, the border between prompt and completion, end tokens and truncation."""

from __future__ import annotations

import dataclasses
from itertools import takewhile
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from alignment.config import DataConfig
from alignment.errors import ConfigError, DataError
from alignment.types import Completion, Group, Message

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""  # noqa: E501
ZEPHYR = """{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""  # noqa: E501
CHAT_TEMPLATES = {"chatml": CHATML, "zephyr": ZEPHYR}

# How far behind the prompt's end the common beginning of prompt and prompt + completion may lie, in tokens. A merge
# over the border moves it by one or two; more means that the template renders the prompt differently before an answer.
MAX_MOVED_BORDER = 8


def chat_template(name: str | None) -> str | None:
    """Resolves `model.chat_template`: a known name, a path, or Jinja text.

    Raises:
        ConfigError: it is none of these.
    """
    if name is None or name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name] if name else None
    if "{%" in name or "{{" in name:
        return name
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    raise ConfigError(
        f"model.chat_template {name!r} is neither a known name ({', '.join(CHAT_TEMPLATES)}) nor a file nor Jinja text"
    )


class GroupTokenizer:
    """Fills in the token ids of groups, by one set of rules.

    The border between prompt and completion is found in the tokens of the whole text, so that a merge across it is
    seen as the model will see it. All completions of a group share the prompt's tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, data: DataConfig, end_tokens: frozenset[int]) -> None:
        """`end_tokens`: ids that end an answer; the first completion without one gets the tokenizer's own."""
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} is not a fast tokenizer; character offsets are needed")
        self.tokenizer = tokenizer
        self.data = data
        self.end_tokens = end_tokens
        ids: list[int] = tokenizer("a")["input_ids"]
        self.ends_by_itself = ids[-1:] == [tokenizer.eos_token_id]

    def __call__(self, group: Group) -> Group:
        """Returns the group with token ids.

        Raises:
            DataError: the prompt fills the window, no token is left to learn, or a message list meets a tokenizer
                without a chat template.
        """
        prompt, wholes = self._encode(group)
        border = self._border(prompt, [ids for ids, _ in wholes])
        completions = [
            (ids[border:], learned[border:], completion)
            for (ids, learned), completion in zip(wholes, group.completions, strict=True)
        ]
        prompt = (wholes[0][0] if wholes else prompt)[:border]
        if self.data.train_on_prompt or not prompt:
            if len(completions) != 1:
                raise DataError("an empty prompt, or train_on_prompt, needs exactly one completion")
            (ids, learned, completion) = completions[0]
            whole = prompt + ids
            learned = [True] * len(whole) if self.data.train_on_prompt else learned
            prompt, completions = whole[:1], [(whole[1:], learned[1:], completion)]
        prompt = self._cut_prompt(prompt)
        room = self.data.max_length - len(prompt)
        return dataclasses.replace(
            group,
            prompt_tokens=tuple(prompt),
            completions=tuple(self._finish(ids, learned, completion, room) for ids, learned, completion in completions),
        )

    def render(self, turns: tuple[Message, ...], *, answer_next: bool) -> str:
        """The turns through the chat template, ending where an answer would begin if `answer_next`."""
        if self.tokenizer.chat_template is None:
            raise DataError(
                "the rows are messages, but the tokenizer has no chat template; set model.chat_template, e.g. to chatml"
            )
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
        except TemplateError as error:
            raise DataError(f"the chat template refuses these messages: {error}") from error
        return text

    def _encode(self, group: Group) -> tuple[list[int], list[tuple[list[int], list[bool]]]]:
        """Token ids of the prompt alone, and (ids, learned) of prompt + completion for each completion."""
        if isinstance(group.prompt, str):
            prompt = self._plain(group.prompt)
            return prompt, [
                (ids, [True] * len(ids)) for ids in (self._plain(group.prompt + c.text) for c in group.completions)
            ]
        prompt_text = self.render(group.prompt, answer_next=True)
        return self._templated(prompt_text)[0], [
            self._conversation(group.prompt, completion) for completion in group.completions
        ]

    def _plain(self, text: str) -> list[int]:
        """Ids with the tokenizer's own beginning (BOS), but without an end token that some add by themselves."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        doubled = ids[:2] == [self.tokenizer.bos_token_id] * 2  # the text has already a BOS of its own
        return ids[int(doubled) : len(ids) - int(self.ends_by_itself)]

    def _templated(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character spans; the template has written every special token itself."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _conversation(self, prompt: tuple[Message, ...], completion: Completion) -> tuple[list[int], list[bool]]:
        turns = (*prompt, Message(role="assistant", content=completion.text), *completion.following)
        text = self.render(turns, answer_next=False)
        ids, spans = self._templated(text)
        if not completion.following:
            return ids, [True] * len(ids)
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant" and index >= len(prompt)]
        borders = [
            (len(self.render(turns[:i], answer_next=True)), len(self.render(turns[: i + 1], answer_next=False)))
            for i in answers
        ]
        # Spans may overlap a border (a merge over it) or be empty (some tokenizers leave white space out of them).
        return ids, [any(start < end and stop > begin for begin, end in borders) for start, stop in spans]

    def _border(self, prompt: list[int], wholes: list[list[int]]) -> int:
        """Number of leading tokens that the prompt and every whole text have in common."""
        border = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(prompt, *wholes, strict=False)))
        if len(prompt) - border > MAX_MOVED_BORDER:
            raise DataError(
                f"the text of the prompt changes when an answer follows ({len(prompt) - border} of its last tokens "
                "differ), so its border cannot be found"
            )
        return border

    def _cut_prompt(self, prompt: list[int]) -> list[int]:
        limit = self.data.max_prompt_length
        if limit is not None and len(prompt) > limit:
            prompt = prompt[-limit:] if self.data.truncate_prompt == "keep_end" else prompt[:limit]
        if len(prompt) >= self.data.max_length:
            raise DataError(
                f"the prompt ({len(prompt)} tokens) fills the window (data.max_length {self.data.max_length})"
            )
        return prompt

    def _finish(self, ids: list[int], learned: list[bool], completion: Completion, room: int) -> Completion:
        """Appends the end token where the answer has none, and cuts what does not fit."""
        end = self._end(ids)
        if end is None:
            ids, learned = [*ids, self.tokenizer.eos_token_id], [*learned, True]
            end = len(ids)
        if not any(learned[:room]):
            raise DataError("no token of the answer is left to learn")
        return dataclasses.replace(
            completion, tokens=tuple(ids[:room]), learned=tuple(learned[:room]), truncated=end > room
        )

    def _end(self, ids: list[int]) -> int | None:
        """Number of tokens up to and with the end token, after which templates write at most white space."""
        for length in range(len(ids), 0, -1):
            if ids[length - 1] in self.end_tokens:
                return length
            if self.tokenizer.decode(ids[length - 1]).strip():
                break
        return None
