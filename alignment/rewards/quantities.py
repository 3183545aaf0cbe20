"""Reads the single number of a text, as people and LaTeX write it. 4√2, 3x+2, (1, 2) and 12:00 are not numbers.

text ─► plain text (dashes, LaTeX, superscripts) ─► items (numbers, words, signs) ─► the only or the last number

Only a bounded part of a text is read, so that no text takes long, and no number has more digits than `MAX_DIGITS`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

MAX_DIGITS = 50
"""A longer number is no answer; some numbers would take hours to compute."""
Kind = Literal["number", "word", "script", "sign"]

FUNCTIONS = frozenset(
    word
    for line in (
        "sqrt cbrt root pi tau sin cos tan cot csc arcsin arccos arctan",
        "sinh cosh tanh log ln lg exp mod inf nan",
    )
    for word in line.split()
)
UNIT_LETTERS = frozenset("mgshlLNJWVAKCF")
SHORT_UNITS = frozenset(
    word
    for line in (
        "mm cm dm km nm um kg mg ug ml cl dl kb mb gb tb hz khz mhz ghz pa kpa ev mol kw kwh mw mph kph rpm psi",
        "ft in yd mi oz lb lbs pt qt gal hr hrs min sec ms ns us day wk yr yrs mo am pm st nd rd th deg rad",
        "usd eur gbp inr cad aud jpy cny rs kj cal atm bar db lx sq cu bn mn mil pct cts pcs bps fps",
    )
    for word in line.split()
)
"""Short units that may follow a number without a space; other such words are products of variables."""
JOINING_WORDS = frozenset({"and", "or", "to", "by", "of", "versus", "vs"})
"""Words between two numbers that together are more than a single number."""
MAX_LENGTH = 1000
"""Most characters of a number with all that belongs to it; a longer formula is no answer."""
MAX_TUPLE = 40
"""Number of items on either side of a number in which brackets around it are searched."""

GROUPED_DIGITS = r"\d{1,3}(?:,\d{3}){1,16}(?!\d|,\d)"
WHOLE_NUMBER = rf"(?:{GROUPED_DIGITS}|\d{{1,{MAX_DIGITS}}}(?!\d))"
DECIMAL_NUMBER = rf"(?:(?:{GROUPED_DIGITS}|\d{{1,{MAX_DIGITS}}})?\.\d{{1,{MAX_DIGITS}}}(?!\d)|{WHOLE_NUMBER})"
TOKEN = re.compile(
    rf"""
    (?P<sign>(?<![\w)\]}}%.⦄°!])[-+](?=\.?\d))?   # neither a minus between two terms nor a bullet
    (?:(?P<whole>{WHOLE_NUMBER})[ ]{{1,2}}(?=\d{{1,{MAX_DIGITS}}}/\d))?   # the 1 of 1 1/2
    (?P<number>{DECIMAL_NUMBER})(?!\.\d)
    (?:[eE](?P<exponent>[-+]?\d{{1,2}})(?!\w))?
    (?:[ ]?/[ ]?(?P<divisor>-?{DECIMAL_NUMBER})(?!\.\d|[ ]?/[ ]?\d))?
    (?:[ ]?[*xX][ ]?10[ ]?\^[ ]?(?P<power>[-+]?\d{{1,2}}(?!\w)|\{{[ ]?[-+]?\d{{1,2}}[ ]?\}}|\([-+]?\d{{1,2}}\)))?
    (?P<percent>[ ]?(?:%|(?i:per[ ]?cent|percentage|pct)\b))?
    |(?P<digits>\d[\d.]*+)                          # too many, a date, a version
    |(?P<script>[\^_][ ]?(?:\{{[^{{}}]{{0,100}}\}}|\([^()]{{0,100}}\)|[-+]?\d+(?:\.\d+)?|\\?[^\W\d_]+|\S))
    |(?P<word>[^\W\d_](?:[^\W_]|['’](?=[^\W\d_]))*+)
    |(?P<command>\\[A-Za-z]++)
    |(?P<brace>[{{}}])
    |(?P<other>\S)""",
    re.VERBOSE,
)

DASHES = dict.fromkeys(map(ord, "−–—‒‐‑﹣－"), "-")
SIGNS = {ord("×"): "*", ord("·"): "*", ord("⋅"): "*", ord("∙"): "*", ord("∗"): "*", ord("÷"): ":", ord("∓"): "±"}
SIGNS |= {ord("％"): "%", ord("⁄"): "/", ord("∕"): "/", ord("º"): "°", ord("˚"): "°", ord("∛"): "√", ord("∜"): "√"}
SPACES = dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f\u200a"), "\u00a0")
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u200e\u200f"), "")
CURRENCIES = dict.fromkeys(map(ord, "€£¥₹₩₽₫₪฿¢₺₴₦"), "")
CHARACTERS = {**DASHES, **SIGNS, **SPACES, **INVISIBLE, **CURRENCIES}
SUPERSCRIPT_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-0123456789+-")
FRACTION_SIGNS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5"}
FRACTION_SIGNS |= {"⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}

ARGUMENT = rf"(?:\{{ {{0,3}}([-+]?) {{0,3}}(\d[\d,]{{0,{MAX_DIGITS}}}(?:\.\d{{1,{MAX_DIGITS}}})?) {{0,3}}\}}|()(\d))"
FRACTION = re.compile(rf"([-+] ?)?\\frac {{0,3}}{ARGUMENT} {{0,3}}{ARGUMENT}")
COMMANDS = {
    "times": "*", "cdot": "*", "ast": "*", "div": ":", "pm": "±", "mp": "±", "pi": "π", "sqrt": "√", "circ": "°",
    "degree": "°", "approx": "≈", "simeq": "≈", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠",
    "lt": "<", "gt": ">", "euro": "", "pounds": "", "quad": " ", "qquad": " ", "displaystyle": "", "left": "",
    "right": "", "big": "", "text": " ", "textbf": "", "textit": "", "textrm": " ", "textsf": "", "mathrm": " ",
    "mathbf": "", "mathit": "", "mathsf": "", "mbox": " ", "hbox": " ", "emph": "", "rm": " ", "bf": "", "bm": "",
    "boldsymbol": "", "operatorname": " ", "boxed": "", "fbox": "",
}  # fmt: skip
"""LaTeX commands, each with the sign, the space or the empty text that replaces it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextItem:
    """A piece of a text: a number with all that belongs to it, a word, a superscript or subscript, or another sign."""

    kind: Kind
    text: str
    start: int
    """Index of its first character."""
    end: int
    """Index after its last character."""
    is_adjacent: bool = False
    """True if there is nothing between it and the previous item."""
    values: frozenset[Fraction] = frozenset()
    """For a number, its possible values; none if it has no value (1/0, a date, too many digits)."""


@dataclass(frozen=True, kw_only=True)
class ParsedAnswer:
    """The answer that a text gives: a number or a formula."""

    values: frozenset[Fraction] = frozenset()
    """The values of the number: one, two for a percentage, none if the answer is not a single number."""
    formula: str = ""
    """If the answer is not a number: its text without spaces, as of a pair, a power or a time; or empty."""


def only_number(text: str) -> frozenset[Fraction]:
    """Reads the number of a text that holds exactly one, perhaps with a unit or words, and nothing that changes it.

    Returns:
        Its values: one, two for a percentage, none if the text is not exactly one number.
    """
    if len(text) > MAX_LENGTH:
        return frozenset()
    items = _items(_drop_choice_letter(to_plain_text(_right_side(text))), formula=True)
    has_sign = len(items) > 1 and items[0].text in ("-", "+") and items[1].kind == "number"
    body = items[1:] if has_sign else items
    number_indices = [index for index, item in enumerate(body) if item.kind == "number"]
    if len(number_indices) != 1 or not all(
        _leaves_number(body, index, number_indices[0]) for index in range(len(body))
    ):
        return frozenset()
    values = body[number_indices[0]].values
    return frozenset(-value for value in values) if has_sign and items[0].text == "-" else values


def last_number(text: str) -> ParsedAnswer:
    """Reads the last number of a text, or the formula that it is a part of, as the 2 of 4√2."""
    text = to_plain_text(_around_last_digit(text))
    items = _items(text)
    number_indices = [index for index, item in enumerate(items) if item.kind == "number"]
    if not number_indices:
        return ParsedAnswer()
    number = _standalone_number(items, number_indices[-1])
    if number.values:
        return ParsedAnswer(values=number.values)
    start, stop = _brackets(items, number_indices[-1])
    if start is not None and stop is not None and _is_in_tuple(items, number_indices[-1]):
        return ParsedAnswer(formula=formula(text[items[start].start : items[stop].end]))
    begin = max(text.rfind(space, 0, number.start) for space in " \n\t") + 1
    word_end = re.compile(r"\s|$").search(text, number.end)
    assert word_end is not None, "a text ends"
    return ParsedAnswer(formula=formula(text[begin : word_end.start()].strip(".,;!?\"'")))


def first_number(text: str) -> frozenset[Fraction]:
    """Reads the number at the beginning of a line, before the words that say what it counts; no values without one."""
    items = _items(to_plain_text(text[:MAX_LENGTH]))
    index = next((index for index, item in enumerate(items) if item.kind == "number"), None)
    if index is None or any(
        item.kind == "word" and item.text in JOINING_WORDS for item in items[index + 1 : index + 2]
    ):
        return frozenset()
    if index + 1 < len(items) and items[index + 1].kind != "word":
        return frozenset()
    return _standalone_number(items, index).values


def _around_last_digit(text: str) -> str:
    """The part of a text that can belong to its last number, from the beginning of a word."""
    digits = re.search(rf"[\d{''.join(FRACTION_SIGNS)}]", text[::-1])
    if digits is None:
        return ""
    end = len(text) - digits.start()
    begin = max(0, end - MAX_LENGTH)
    if begin:
        space = re.compile(r"\s").search(text, begin, end)
        begin = space.end() if space else begin
    return text[begin : end + MAX_LENGTH]


def has_words(text: str) -> bool:
    """True if a text is more than a formula: it has a word of two or more letters that is no function and no unit."""
    return any(
        item.kind == "word" and len(item.text) > 1 and item.text.lower() not in JOINING_WORDS | FUNCTIONS | SHORT_UNITS
        for item in _items(to_plain_text(text[:MAX_LENGTH]), formula=True)
    )


def formula(text: str) -> str:
    """A formula, which is more than a number, in the form in which it is compared: without spaces. Else empty."""
    text = text.strip().rstrip(".")
    if len(text) > MAX_LENGTH:
        return ""
    text = to_plain_text(text)
    items = _items(text)
    is_formula = len(items) > 1 and any(character.isdigit() for character in text)
    return re.sub(r"\s+", "", text) if is_formula else ""


def to_plain_text(text: str) -> str:
    """The text with the fractions, spaces and fonts of LaTeX as people type them, and without currencies."""
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text.translate(CHARACTERS))
    text = re.sub(r"(?<=\d)(?:\\[,! ]|\{,\}|\u00a0)(?=\d{3})", ",", text)
    text = re.sub(r"\\[,;:! ()\[\]]", " ", text).replace("\u00a0", " ").replace("~", " ")
    text = re.sub(r"\\([%$#&_|])", r"\1", text).replace("$", "").replace("\\{", "⦃").replace("\\}", "⦄")
    text = FRACTION.sub(_slash_fraction, text)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda match: f"^{{{match.group().translate(SUPERSCRIPT_DIGITS)}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉₊₋]+", lambda match: f"_{{{match.group().translate(SUPERSCRIPT_DIGITS)}}}", text)
    text = re.sub(
        f"(\\d?)([{''.join(FRACTION_SIGNS)}])",
        lambda match: f"{match[1]} {FRACTION_SIGNS[match[2]]}".lstrip(),
        text,
    )
    text = re.sub(r"\\([A-Za-z]+)\*?", lambda match: COMMANDS.get(match[1], match.group()), text)
    text = re.sub(r"\^ ?(?:\{ ?° ?\}|°)", "°", text)
    text = re.sub(r"(?<=[\d)])\*\*(?=[\d(-])", "^", text)  # a power of Python; elsewhere ** is bold
    return re.sub(r"\*\*|__", "", text)


def _slash_fraction(fraction: re.Match[str]) -> str:
    """A fraction of LaTeX written with a slash, with spaces where it would touch other digits."""
    outer_sign, *groups = fraction.groups(default="")
    top_sign, top, _, top_digit, bottom_sign, bottom, _, bottom_digit = groups
    is_negative = [outer_sign.strip(), top_sign, bottom_sign].count("-") % 2
    previous_character = fraction.string[fraction.start() - 1 : fraction.start()]
    space = " " if previous_character.isalnum() or previous_character in (")", "}", ".") else ""
    sign = (
        outer_sign
        if previous_character.isalnum() and not (top_sign or bottom_sign)
        else ("-" if is_negative else outer_sign.replace("-", ""))
    )
    next_character = fraction.string[fraction.end() : fraction.end() + 1]
    return f"{space}{sign}{top or top_digit}/{bottom or bottom_digit}" + (" " if next_character.isdigit() else "")


def _right_side(text: str) -> str:
    """The text right of the last `=`, if the left side is one expression; else the whole text."""
    left_side, equals, right_side = text.rpartition("=")
    if not equals or re.search(r"[<>!≤≥≠]\s?$|\\[lgn]eq?\s?$", left_side):
        return text
    list_text = re.sub(r"\([^()]*+\)|\{,\}|(?<=\d),(?=\d{3})", "", left_side)
    if re.search(r"[,;]|\b(?:and|or)\b|\\text\{ ?(?:and|or)", list_text) and re.search(r"=|\d\s*[,;]", list_text):
        return text
    if re.fullmatch(r"[\s\\{}a-zA-Z]*", right_side) and re.search(r"\d", left_side):
        return left_side  # 5 = x
    return right_side


def _drop_choice_letter(text: str) -> str:
    """The text without the letter of a choice at its beginning, as (B)."""
    return re.sub(r"^[\s{]{0,5}\(?[A-H][).:](?=[\s}]|\d|-)", "", text)


def _items(text: str, *, formula: bool = False) -> list[TextItem]:
    """The items of a plain text.

    Args:
        formula: read digits in groups of three, with spaces between them, as one number.
    """
    if formula:
        groups = r"(?<![\d.,])\d{1,3}(?: \d{3}){1,16}(?![\d,])"
        text = re.sub(groups, lambda match: match.group().replace(" ", ","), text)
    items: list[TextItem] = []
    end = -1
    for token in TOKEN.finditer(text):
        is_adjacent = token.start() == end
        end = token.end()
        if token["brace"]:
            end = end if is_adjacent else -1
            continue
        kind: Kind = "sign"
        if token["number"] or token["digits"]:
            kind = "number"
        elif token["word"] or token["script"]:
            kind = "word" if token["word"] else "script"
        values = _values(token) if token["number"] else frozenset[Fraction]()
        items.append(
            TextItem(
                kind=kind, text=token.group(), start=token.start(), end=end, is_adjacent=is_adjacent, values=values
            )
        )
    return items


def _values(token: re.Match[str]) -> frozenset[Fraction]:
    """The possible values of a number: two for a percentage, none for a division by zero."""
    value = _fraction(token["number"])
    if token["exponent"]:
        value *= Fraction(10) ** int(token["exponent"])
    if token["divisor"]:
        divisor = _fraction(token["divisor"])
        if divisor == 0:
            return frozenset()
        value /= divisor
    if token["whole"]:
        value += _fraction(token["whole"])
    if token["power"]:
        value *= Fraction(10) ** int(token["power"].strip("{()} "))
    if token["sign"] == "-":
        value = -value
    return frozenset({value, value / 100} if token["percent"] else {value})


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _is_factor(word: TextItem) -> bool:
    """True if a word beside a number is a variable, a constant or a function, and not a unit."""
    text = word.text
    if text in FUNCTIONS or text.startswith("sqrt"):
        return True
    if word.is_adjacent and any(character.isdigit() for character in text):  # 1e400, 0x1F4
        return True
    if len(text) == 1:
        return text not in UNIT_LETTERS
    return word.is_adjacent and len(text) < 4 and text.lower() not in SHORT_UNITS


def _leaves_number(items: list[TextItem], index: int, number_index: int) -> bool:
    """True if an item of a formula does not change its only number: a unit, a word, punctuation."""
    item = items[index]
    previous_item = items[index - 1] if index else None
    next_item = items[index + 1] if index + 1 < len(items) else None
    if item.kind == "number":
        return True
    if item.kind == "script":
        return (
            item.text[0] == "^"
            and previous_item is not None
            and previous_item.kind == "word"
            and not _is_factor(previous_item)
        )
    if item.kind == "word":
        return not (_is_factor(item) or any(character.isdigit() for character in item.text))
    if item.text in "/*-":  # of a unit, as in m/s or 5-inch
        return (
            next_item is not None
            and next_item.kind == "word"
            and (item.text == "/" or index - 1 != number_index or item.is_adjacent)
        )
    if item.text in "()":
        return True
    if item.text in ",;":
        return next_item is None
    return (
        item.text in "°≈.?'\"`"
        or (item.text == "!" and index - 1 != number_index)
        or (item.text == ":" and index < number_index)
    )


def _standalone_number(items: list[TextItem], index: int) -> TextItem:
    """The number at an index, without values if it is a part of something else."""
    number = items[index]
    previous_items, next_items = items[index - 1 :: -1][:3] if index else [], items[index + 1 : index + 4]
    if _is_modified_before(number, previous_items) or _is_modified_after(next_items) or _is_in_tuple(items, index):
        return replace(number, values=frozenset())
    return number


def _is_modified_before(number: TextItem, previous_items: list[TextItem]) -> bool:
    """True if the items before a number make it a part of a formula: a root, ±, a sign after a variable, `f(`."""
    if not previous_items:
        return False
    sign, *earlier_items = previous_items
    if sign.kind == "script" or sign.text in ("√", "±", "≤", "≥", "≠", "π", "∞"):
        return sign.kind != "script" or number.is_adjacent
    if sign.kind != "sign" or not earlier_items:
        return False
    if sign.text in ":/" and number.is_adjacent and sign.is_adjacent:
        return earlier_items[0].kind == "number"
    if sign.text == "(" and sign.is_adjacent:
        return earlier_items[0].text == "√" or (
            earlier_items[0].kind == "word" and _is_factor(replace(earlier_items[0], is_adjacent=False))
        )
    if sign.text in "+-*/" and (
        sign.text != "-" or not number.is_adjacent or sign.is_adjacent or earlier_items[0].text != "="
    ):
        return _ends_factor(earlier_items)
    return False


def _ends_factor(previous_items: list[TextItem]) -> bool:
    """True if the items (the nearest first) end a term with a variable, a root or a constant."""
    last_item = previous_items[0]
    if last_item.kind == "script":
        return len(previous_items) < 2 or previous_items[1].kind != "word" or _is_factor(previous_items[1])
    if last_item.kind == "word":
        return _is_factor(last_item) and last_item.text not in ("a", "A", "I")
    return last_item.text in ("√", "π", ")", "]", "|") or last_item.text.startswith("\\")


def _is_modified_after(next_items: list[TextItem]) -> bool:
    """True if the items after a number make it a part of a formula: a variable, a power, a root, minutes."""
    if not next_items:
        return False
    next_item, *later_items = next_items
    if next_item.kind == "script" or next_item.text in ("√", "π", "±", "∞", "!!"):
        return True
    if next_item.kind == "word":
        if next_item.is_adjacent or len(next_item.text) > 1:
            return _is_factor(next_item) and (next_item.is_adjacent or next_item.text in FUNCTIONS)
        return (
            _is_factor(next_item)
            and next_item.text not in "aAI"
            and not (later_items and later_items[0].kind in ("number", "word"))
        )
    if next_item.text.startswith("\\"):
        return True
    if next_item.text == "(":
        return next_item.is_adjacent
    if next_item.text == ":" and next_item.is_adjacent:
        return bool(later_items) and later_items[0].kind == "number" and later_items[0].is_adjacent
    if next_item.text in "+-*/" and later_items:
        return _begins_factor(later_items, has_space=not next_item.is_adjacent)
    return False


def _begins_factor(next_items: list[TextItem], *, has_space: bool) -> bool:
    """True if the items begin a term with a variable, a root or a constant."""
    next_item = next_items[0]
    if next_item.kind == "word":
        return _is_factor(replace(next_item, is_adjacent=False)) and not (has_space and next_item.text in "aAI")
    return next_item.text in ("√", "π", "(") or next_item.text.startswith("\\")


def _brackets(items: list[TextItem], index: int) -> tuple[int | None, int | None]:
    """Indices of the brackets around a number, if there are some near it."""
    reach = range(max(0, index - MAX_TUPLE), min(len(items), index + MAX_TUPLE))
    start = next(
        (position for position in reversed(reach[: index - reach.start]) if items[position].text in "([⦃"), None
    )
    stop = next((position for position in reach[index - reach.start :] if items[position].text in ")]⦄"), None)
    return start, stop


def _is_in_tuple(items: list[TextItem], index: int) -> bool:
    """True if a number is in brackets with other numbers and nothing else: a pair, a set, an interval."""
    start, stop = _brackets(items, index)
    if start is None or stop is None:
        return False
    inner = items[start + 1 : stop]
    return any(item.text in ",;" for item in inner) and all(
        item.kind == "number" or item.text in (",", ";", "-", "π", "∞") for item in inner
    )
