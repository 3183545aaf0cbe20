"""Encodes a prompt and what follows it so that the prompt has the tokens that it has alone, as generation reads it.

A tokenizer may read the end of a prompt and the beginning of an answer as one token: `assistant\\n` and `\\n\\nGood`
together have a token of three line breaks. Generation begins after the prompt's own tokens, so training must too. There
the text is encoded in two pieces, and the answer gets the tokens that a model writes after that prompt.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Sequence

from alignment.data.control_tokens import ControlTokens, Encoding
from alignment.errors import DataError

LEADS = ("", "\n", "\ufdd4")
"""Texts to encode before the second piece, and to take away again: some tokenizers write a space before every text. The
last one is a noncharacter of Unicode, which is in no word of a vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BorderedEncoding:
    """An encoding in which no token spans one of the borders."""

    encoding: Encoding
    """The tokens of the whole text."""
    first_tokens: tuple[int, ...]
    """For each border, the index of the first token after it."""


def encode_with_borders(
    control: ControlTokens, text: str, borders: Sequence[int], prompt: Encoding
) -> BorderedEncoding:
    """Encodes a rendered text so that what precedes each border has the tokens that generation's prompt has there.

    Args:
        borders: where in the text each answer begins (characters), in order.
        prompt: the tokens of the text before the first border.

    Raises:
        DataError: the text cannot be encoded so.
    """
    encoding = control.encode(text)
    control_starts = [start for start, _ in control.find(text)] if len(borders) > 1 else []
    first_tokens: list[int] = []
    for border in borders:
        head_start, num_before, head = 0, 0, prompt
        if first_tokens:  # no token spans a control token, so the text after the last one before the border suffices
            control_start = control_starts[bisect_left(control_starts, border) - 1] if control_starts else 0
            index = _token_at(encoding, control_start)
            head_start, num_before = (control_start, index) if index is not None else (0, 0)
            head = control.encode(text[head_start:border])
        first_token = num_before + len(head.ids)
        if encoding.ids[num_before:first_token] != head.ids:
            begin = Encoding(
                ids=encoding.ids[:num_before] + head.ids,
                spans=encoding.spans[:num_before] + _move(head, head_start).spans,
            )
            rest = _move(encode_after(control, begin.ids, text[border:], encoding.ids), border)
            encoding = Encoding(ids=begin.ids + rest.ids, spans=begin.spans + rest.spans)
        first_tokens.append(first_token)
    return BorderedEncoding(encoding=encoding, first_tokens=tuple(first_tokens))


def encode_after(control: ControlTokens, prompt_ids: list[int], text: str, whole_ids: list[int]) -> Encoding:
    """The tokens of a text that follows a prompt whose tokens stay as they are.

    Args:
        whole_ids: the tokens of the prompt and the text together, if they are read as one text.

    Raises:
        DataError: the tokenizer has no tokens for the text alone that stand for the same characters.
    """
    decode = control.tokenizer.decode
    whole_text = decode(whole_ids, clean_up_tokenization_spaces=False)
    for lead in LEADS:
        lead_ids = control.encode(lead).ids
        encoding = control.encode(lead + text)
        rest = Encoding(ids=encoding.ids[len(lead_ids) :], spans=encoding.spans[len(lead_ids) :])
        is_apart = encoding.ids[: len(lead_ids)] == lead_ids
        if is_apart and decode([*prompt_ids, *rest.ids], clean_up_tokenization_spaces=False) == whole_text:
            return _move(rest, -len(lead))
    raise DataError(
        f"the tokenizer reads the end of the prompt and the beginning of the answer {control.unshield(text)!r:.50} as "
        "one token, so the model could not learn the answer after the prompt that it is asked; move white space from "
        "the end of the prompt to the beginning of the answer"
    )


def _token_at(encoding: Encoding, start: int) -> int | None:
    """Index of the token whose characters begin at `start`; None if there is none."""
    return next((index for index, (begin, stop) in enumerate(encoding.spans) if begin == start < stop), None)


def _move(encoding: Encoding, offset: int) -> Encoding:
    """The encoding with its spans moved by a number of characters."""
    return Encoding(ids=encoding.ids, spans=[(start + offset, stop + offset) for start, stop in encoding.spans])
