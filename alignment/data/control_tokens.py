"""Reads control tokens in people's texts as ordinary text, so that no text can end its own turn or open another one.

A chat template writes control tokens (`<|im_end|>`), and a tokenizer cannot distinguish them from the same characters
in a message. So every control token in a message is replaced by a stand-in before rendering (it is shielded), and the
rendered text is encoded with the stand-ins read as ordinary characters:

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

# Noncharacters of Unicode, which do not occur in people's texts: they mark stand-ins.
OPEN, CLOSE, BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
SHIELD = re.compile(f"{OPEN}(\\d+){CLOSE}")

REASONING_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought\n", "<channel|>"),
)
"""Marks around the reasoning of a model. An assistant's own text may hold them, and chat templates search for them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """Token ids of a text, with the characters that each token stands for."""

    ids: list[int]
    """Token ids."""
    spans: list[Span]
    """Start and stop of each token, in characters of the encoded text."""


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and the added tokens that its chat template writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        templates = tokenizer.chat_template or ""
        template = "".join(templates.values()) if isinstance(templates, dict) else templates
        tokens_by_text = {
            token.content: token
            for token in tokenizer.added_tokens_decoder.values()
            if token.content.strip() and (token.special or token.content in template)
        }
        self._special = [text for text, token in tokens_by_text.items() if token.special]
        self._tokens_by_text = tokens_by_text
        self.texts: tuple[str, ...] = tuple(tokens_by_text)
        self._number_by_text = {text: number for number, text in enumerate(tokens_by_text)}
        # A model writes its own reasoning marks, and marks of calls that are not special tokens; they are not shielded.
        reasoning_marks = {mark.strip() for pair in REASONING_MARKS for mark in pair}
        self._all_finder = _Finder(set(tokens_by_text))
        self._assistant_finder = _Finder(set(self._special) - reasoning_marks)
        self._text_encoder: Tokenizer | None = None

    def holds(self, text: str, *, role: str = "user") -> bool:
        """True if a text by a speaker of this role holds a control token."""
        return self._finder(role).search(text)

    def find(self, text: str) -> list[Span]:
        """Start and stop (characters) of every control token in a rendered text, in order."""
        return [(start, start + len(token)) for start, token in self._all_finder.find(text)]

    def shield(self, value: Any, *, role: str = "user") -> Any:
        """The same text, or lists and mappings of texts, with a stand-in for every control token.

        Raises:
            DataError: a text with control tokens also holds one of the noncharacters of the stand-ins.
        """
        if isinstance(value, str):
            finder = self._finder(role)
            if not finder.search(value):
                return value
            if OPEN in value or CLOSE in value or BREAK in value:
                raise DataError("a text with control tokens also holds a noncharacter (U+FDD0 to U+FDD2)")
            return finder.replace(value, lambda text: f"{OPEN}{self._number_by_text[text]}{CLOSE}")
        if isinstance(value, Mapping):
            return {key: self.shield(item, role=role) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.shield(item, role=role) for item in value]
        return value

    def shield_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Chat messages in the form of templates, with every text shielded, and every role that is not a word."""
        return [
            {
                name: self.shield_role(value) if name == "role" else self.shield(value, role=str(message.get("role")))
                for name, value in message.items()
            }
            for message in messages
        ]

    def shield_role(self, role: Any) -> Any:
        """A role with stand-ins for control tokens. A role that is one word stays as it is, even if it is a token."""
        return role if isinstance(role, str) and role.isidentifier() else self.shield(role)

    def is_shielded(self, text: str) -> bool:
        """True if a text holds stand-ins."""
        return OPEN in text

    def unshield(self, text: str) -> str:
        """The text with every stand-in replaced by its control token."""
        return SHIELD.sub(lambda match: self.texts[int(match[1])], text) if OPEN in text else text

    def encode(self, text: str) -> Encoding:
        """Encodes a rendered text without the tokens that the tokenizer adds by itself; stand-ins are read as text.

        A text without stand-ins is encoded by the tokenizer as it is. Spans refer to the given text.

        Raises:
            DataError: the tokenizer reads a shielded text as control tokens even in pieces.
        """
        if OPEN not in text:
            tokenizer_output = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return Encoding(ids=tokenizer_output["input_ids"], spans=tokenizer_output["offset_mapping"])
        for breaks in (False, True):
            encoding = self._encode_shielded(text, breaks=breaks)
            if encoding is not None:
                return encoding
        raise DataError("the tokenizer reads control tokens in a text even piece by piece")

    def _encode_shielded(self, text: str, *, breaks: bool) -> Encoding | None:
        """`breaks`: divide the text of every stand-in in two, for tokenizers whose words include control tokens."""
        encoder = self._encoder()
        # The template's control tokens become fences, which the encoder knows; stand-ins become their characters.
        pieces: list[str] = []
        origins: list[Span] = []  # for each character of the new text, its start and stop in `text`
        num_fences = position = 0
        for start, stop, number, is_stand_in in self._find_marks(text):
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
        encoding = encoder.encode("".join(pieces), add_special_tokens=False)
        ids, spans, num_control = [], [], 0
        for id_, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if id_ == self._break_id:
                continue
            control = self._control_id_by_fence.get(id_)
            num_control += control is not None or id_ in self._control_ids
            ids.append(id_ if control is None else control)
            begin = origins[start][0]
            spans.append((begin, origins[stop - 1][1] if stop > start else begin))
        return Encoding(ids=ids, spans=spans) if num_control == num_fences else None

    def _find_marks(self, text: str) -> list[tuple[int, int, int, bool]]:
        """Start, stop and number of every control token in a rendered text, and whether it is a stand-in."""
        stand_ins = [(m.start(), m.end(), int(m[1]), True) for m in SHIELD.finditer(text)]
        template_marks = [
            (start, start + len(t), self._number_by_text[t], False) for start, t in self._all_finder.find(text)
        ]
        return sorted(stand_ins + template_marks)

    def _encoder(self) -> Tokenizer:
        """A copy of the tokenizer that reads control tokens as text, and fences as control tokens."""
        if self._text_encoder is None:
            from tokenizers import AddedToken, Tokenizer

            encoder = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
            encoder.no_truncation()
            encoder.no_padding()
            encoder.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in self.texts])
            option_names = ("lstrip", "rstrip", "normalized")
            fences = [
                AddedToken(
                    _fence(number),
                    special=False,
                    **{name: getattr(self._tokens_by_text[text], name) for name in option_names},
                )
                for number, text in enumerate(self.texts)
            ]
            encoder.add_tokens([*fences, AddedToken(BREAK, special=False, normalized=False)])
            encoder.encode_special_tokens = True
            ids = [self.tokenizer.convert_tokens_to_ids(text) for text in self.texts]
            self._control_ids = frozenset(ids)
            self._control_id_by_fence = {encoder.token_to_id(_fence(number)): id_ for number, id_ in enumerate(ids)}
            self._break_id = encoder.token_to_id(BREAK)
            self._text_encoder = encoder
        return self._text_encoder

    def _finder(self, role: str) -> _Finder:
        return self._assistant_finder if role == "assistant" else self._all_finder


def chat_prompt_ids(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    control_tokens: ControlTokens | None = None,
    **template_kwargs: Any,
) -> list[int]:
    """Token ids of the prompt of a chat; control tokens in the messages are read as text, as in training.

    Args:
        messages: in the form of chat templates.
        tools: JSON schemas of the functions that the assistant may call.
        control_tokens: those of the tokenizer; make them once for many prompts. None makes them here.
        template_kwargs: arguments of `apply_chat_template`; `add_generation_prompt` is true by default.

    Raises:
        DataError: a text holds control tokens that cannot be read as text.
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
    """Finds any of many strings in a text, the longest first, in time that does not depend on the number of strings."""

    def __init__(self, strings: set[str]) -> None:
        self._strings = strings
        self._lengths = sorted({len(text) for text in strings}, reverse=True)
        first_characters = "".join(re.escape(character) for character in sorted({text[0] for text in strings}))
        self._first_character = re.compile(f"[{first_characters}]") if strings else re.compile(r"(?!)")

    def find(self, text: str) -> list[tuple[int, str]]:
        """The start of each string in the text, and the string; they do not overlap."""
        matches: list[tuple[int, str]] = []
        match = self._first_character.search(text)
        while match is not None:
            start = match.start()
            string = next((s for n in self._lengths if (s := text[start : start + n]) in self._strings), None)
            if string is not None:
                matches.append((start, string))
            match = self._first_character.search(text, start + (len(string) if string else 1))
        return matches

    def search(self, text: str) -> bool:
        """True if any of the strings is in the text."""
        return self._first_character.search(text) is not None and bool(self.find(text))

    def replace(self, text: str, replacement: Callable[[str], str]) -> str:
        """The text with every string replaced by what `replacement` returns for it."""
        pieces, position = [], 0
        for start, string in self.find(text):
            pieces += [text[position:start], replacement(string)]
            position = start + len(string)
        return "".join([*pieces, text[position:]])


def _fence(number: int) -> str:
    return f"{OPEN}{number}{CLOSE}"
