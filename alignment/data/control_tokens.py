"""Control tokens that stand in people's texts, read as text: a text cannot end its own turn or open another's.

A chat template writes control tokens (`<|im_end|>`), and a tokenizer cannot tell those from the same characters in a
message. So the texts are shielded before they are rendered, and the rendered text is encoded with what was shielded
taken for ordinary characters:

    messages ─► shield ─► chat template ─► encode ─► token ids
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignment.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]

# Noncharacters of Unicode, which no text of people holds: they fence what stands for something else.
OPEN, CLOSE, BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
SHIELD = re.compile(f"{OPEN}(\\d+){CLOSE}")

THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought\n", "<channel|>"),
)
"""Marks around the thought of a thinking model. An assistant's own text may hold them, and templates look for them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """Token ids of a text, and which characters of it each stands for."""

    ids: list[int]
    spans: list[Span]
    """Of each token, in characters of the text that was encoded."""


class ControlTokens:
    """The control tokens of a tokenizer: its special ones, and the added ones that its chat template writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        templates = tokenizer.chat_template or ""
        template = "".join(templates.values()) if isinstance(templates, dict) else templates
        added = {
            token.content: token
            for token in tokenizer.added_tokens_decoder.values()
            if token.content.strip() and (token.special or token.content in template)
        }
        self._special = [text for text, token in added.items() if token.special]
        self._tokens = added
        self.texts: tuple[str, ...] = tuple(added)
        self._numbers = {text: number for number, text in enumerate(added)}
        # An assistant's text is what a model writes: thoughts, and calls in the marks that are no special tokens.
        thoughts = {mark.strip() for pair in THOUGHTS for mark in pair}
        self._everybody = _Finder(set(added))
        self._assistant = _Finder(set(self._special) - thoughts)
        self._text_encoder: Tokenizer | None = None

    def holds(self, text: str, *, role: str = "user") -> bool:
        """Whether a text by someone of this role holds a control token."""
        return self._finder(role).search(text)

    def find(self, text: str) -> list[Span]:
        """Where control tokens stand in a rendered text, in order."""
        return [(start, start + len(token)) for start, token in self._everybody.find(text)]

    def shield(self, value: Any, *, role: str = "user") -> Any:
        """The same text, or nest of lists and mappings of texts, with a stand-in for every control token.

        Raises:
            DataError: a text that holds some also holds a noncharacter of ours.
        """
        if isinstance(value, str):
            finder = self._finder(role)
            if not finder.search(value):
                return value
            if OPEN in value or CLOSE in value or BREAK in value:
                raise DataError("a text with control tokens also holds a noncharacter (U+FDD0 to U+FDD2)")
            return finder.replace(value, lambda text: f"{OPEN}{self._numbers[text]}{CLOSE}")
        if isinstance(value, Mapping):
            return {key: self.shield(item, role=role) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.shield(item, role=role) for item in value]
        return value

    def shield_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Chat messages as templates take them, with every text shielded, and a role that is no word."""
        return [
            {
                name: self.shield_role(value) if name == "role" else self.shield(value, role=str(message.get("role")))
                for name, value in message.items()
            }
            for message in messages
        ]

    def shield_role(self, role: Any) -> Any:
        """A speaker with stand-ins for control tokens, which no name has. A word stays, whatever the tokenizer has."""
        return role if isinstance(role, str) and role.isidentifier() else self.shield(role)

    def is_shielded(self, text: str) -> bool:
        """Whether stand-ins are in a text."""
        return OPEN in text

    def unshield(self, text: str) -> str:
        """The text with the control tokens in place of their stand-ins."""
        return SHIELD.sub(lambda match: self.texts[int(match[1])], text) if OPEN in text else text

    def encode(self, text: str) -> Encoding:
        """Ids of a rendered text without what the tokenizer adds by itself; what is shielded in it becomes text.

        A text without stand-ins is encoded by the tokenizer as it is. Spans are those of the given text.
        """
        if OPEN not in text:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return Encoding(ids=encoded["input_ids"], spans=encoded["offset_mapping"])
        for breaks in (False, True):
            encoding = self._encode_shielded(text, breaks=breaks)
            if encoding is not None:
                return encoding
        raise DataError("the tokenizer reads control tokens in a text even piece by piece")

    def _encode_shielded(self, text: str, *, breaks: bool) -> Encoding | None:
        """`breaks`: cut every stand-in's text in two, for tokenizers whose words include control tokens."""
        encoder = self._encoder()
        # The template's control tokens become fences, which the encoder knows, and stand-ins become their characters.
        pieces: list[str] = []
        origins: list[Span] = []  # of each character of the new text, what it stands for in `text`
        num_fences = position = 0
        for start, stop, number, is_stand_in in self._marks(text):
            pieces.append(text[position:start])
            origins.extend((index, index + 1) for index in range(position, start))
            literal = self.texts[number]
            if not is_stand_in:
                literal = _fence(number)
                num_fences += 1
            elif breaks:
                literal = literal[:1] + BREAK + literal[1:]
            pieces.append(literal)
            origins.extend([(start, stop)] * len(literal))
            position = stop
        pieces.append(text[position:])
        origins.extend((index, index + 1) for index in range(position, len(text) + 1))
        encoded = encoder.encode("".join(pieces), add_special_tokens=False)
        ids, spans, num_control = [], [], 0
        for id_, (start, stop) in zip(encoded.ids, encoded.offsets, strict=True):
            if id_ == self._break_id:
                continue
            control = self._control_of.get(id_)
            num_control += control is not None or id_ in self._control_ids
            ids.append(id_ if control is None else control)
            begin = origins[start][0]
            spans.append((begin, origins[stop - 1][1] if stop > start else begin))
        return Encoding(ids=ids, spans=spans) if num_control == num_fences else None

    def _marks(self, text: str) -> list[tuple[int, int, int, bool]]:
        """Start, stop and number of every control token in a rendered text, and whether it is a stand-in."""
        stand_ins = [(m.start(), m.end(), int(m[1]), True) for m in SHIELD.finditer(text)]
        written = [(start, start + len(t), self._numbers[t], False) for start, t in self._everybody.find(text)]
        return sorted(stand_ins + written)

    def _encoder(self) -> Tokenizer:
        """A copy of the tokenizer that takes control tokens for text and fences for control tokens."""
        if self._text_encoder is None:
            from tokenizers import AddedToken, Tokenizer

            encoder = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
            encoder.no_truncation()
            encoder.no_padding()
            encoder.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in self.texts])
            how = ("lstrip", "rstrip", "normalized")
            fences = [
                AddedToken(_fence(number), special=False, **{name: getattr(self._tokens[text], name) for name in how})
                for number, text in enumerate(self.texts)
            ]
            encoder.add_tokens([*fences, AddedToken(BREAK, special=False, normalized=False)])
            encoder.encode_special_tokens = True
            ids = [self.tokenizer.convert_tokens_to_ids(text) for text in self.texts]
            self._control_ids = frozenset(ids)
            self._control_of = {encoder.token_to_id(_fence(number)): id_ for number, id_ in enumerate(ids)}
            self._break_id = encoder.token_to_id(BREAK)
            self._text_encoder = encoder
        return self._text_encoder

    def _finder(self, role: str) -> _Finder:
        return self._assistant if role == "assistant" else self._everybody


def chat_prompt_ids(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    control_tokens: ControlTokens | None = None,
    **template_kwargs: Any,
) -> list[int]:
    """Token ids of a chat's prompt, with control tokens in the messages read as text, as training reads them.

    Args:
        messages: as chat templates take them.
        control_tokens: those of the tokenizer, to be made once where there are many prompts; None makes them.
        template_kwargs: for `apply_chat_template`; `add_generation_prompt` is true unless it says otherwise.

    Raises:
        DataError: a text holds control tokens, and cannot be read as text.
    """
    control = control_tokens or ControlTokens(tokenizer)
    text = tokenizer.apply_chat_template(
        control.shield_messages(messages),
        tools=[control.shield(tool) for tool in tools] if tools else None,
        tokenize=False,
        **{"add_generation_prompt": True, **template_kwargs},
    )
    return control.encode(str(text)).ids


class _Finder:
    """Finds any of many strings in a text, the longest first, in time that does not grow with their number."""

    def __init__(self, strings: set[str]) -> None:
        self._strings = strings
        self._lengths = sorted({len(text) for text in strings}, reverse=True)
        first = "".join(re.escape(character) for character in sorted({text[0] for text in strings}))
        self._first = re.compile(f"[{first}]") if strings else re.compile(r"(?!)")

    def find(self, text: str) -> list[tuple[int, str]]:
        """Places of the strings in the text, none overlapping another."""
        hits: list[tuple[int, str]] = []
        match = self._first.search(text)
        while match is not None:
            start = match.start()
            hit = next((s for n in self._lengths if (s := text[start : start + n]) in self._strings), None)
            if hit is not None:
                hits.append((start, hit))
            match = self._first.search(text, start + (len(hit) if hit else 1))
        return hits

    def search(self, text: str) -> bool:
        return self._first.search(text) is not None and bool(self.find(text))

    def replace(self, text: str, replacement: Callable[[str], str]) -> str:
        pieces, position = [], 0
        for start, hit in self.find(text):
            pieces += [text[position:start], replacement(hit)]
            position = start + len(hit)
        return "".join([*pieces, text[position:]])


def _fence(number: int) -> str:
    return f"{OPEN}{number}{CLOSE}"
