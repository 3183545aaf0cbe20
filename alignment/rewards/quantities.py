"""Reads a text's single number, as people and LaTeX write it, and nothing else: 4√2, 3x+2, (1, 2) and 12:00 are none.

text ─► plain (dashes, LaTeX, superscripts) ─► items (numbers, words, scripts, signs) ─► the only number, or the last

Only a bounded part of a text is read, so that no text takes long, and no number has more digits than `MAX_DIGITS`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

MAX_DIGITS = 50
"""Longer numbers are no answer; a completion could otherwise name one that takes hours to write out."""
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
"""Words of two or three letters that may follow a number without a space and are no product of variables."""
JOINING = frozenset({"and", "or", "to", "by", "of", "versus", "vs"})
"""Words that join numbers to more than a single one."""
LONGEST = 1000
"""Characters in which a number stands with all that belongs to it; a longer formula is no answer."""
MAX_TUPLE = 40
"""Items on either side of a number in which brackets around it are looked for."""

GROUPED = r"\d{1,3}(?:,\d{3}){1,16}(?!\d|,\d)"
WHOLE = rf"(?:{GROUPED}|\d{{1,{MAX_DIGITS}}}(?!\d))"
PLAIN = rf"(?:(?:{GROUPED}|\d{{1,{MAX_DIGITS}}})?\.\d{{1,{MAX_DIGITS}}}(?!\d)|{WHOLE})"
TOKEN = re.compile(
    rf"""
    (?P<sign>(?<![\w)\]}}%.⦄°!])[-+](?=\.?\d))?   # neither a minus between two terms nor a bullet
    (?:(?P<whole>{WHOLE})[ ]{{1,2}}(?=\d{{1,{MAX_DIGITS}}}/\d))?   # the 1 of 1 1/2
    (?P<number>{PLAIN})(?!\.\d)
    (?:[eE](?P<exponent>[-+]?\d{{1,2}})(?!\w))?
    (?:[ ]?/[ ]?(?P<divisor>-?{PLAIN})(?!\.\d|[ ]?/[ ]?\d))?
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
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-0123456789+-")
VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5"}
VULGAR |= {"⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}

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
"""LaTeX commands as one sign, or as the space or nothing that they leave in front of a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A piece of a text: a number with what belongs to it, a word, what is raised or lowered, or another sign."""

    kind: Kind
    text: str
    start: int
    end: int
    glued: bool = False
    """True if nothing stands between it and the item before."""
    values: frozenset[Fraction] = frozenset()
    """Of a number: its readings; none if it is no number after all (1/0, a date, too many digits)."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a text gives as its answer."""

    values: frozenset[Fraction] = frozenset()
    """The number: one reading, two for a percentage, none if it is not a single number."""
    formula: str = ""
    """What it is instead, as it stands there without spaces: nothing, or a pair, a power, a time …"""


def only_number(text: str) -> frozenset[Fraction]:
    """The number of a text that holds one, perhaps with a unit or words beside it, and nothing that changes it.

    Returns:
        Its readings: one, two for a percentage, none if there is more than a number or less.
    """
    if len(text) > LONGEST:
        return frozenset()
    items = _items(_without_choice(plain(_right_side(text))), formula=True)
    negative = len(items) > 1 and items[0].text in ("-", "+") and items[1].kind == "number"
    body = items[1:] if negative else items
    numbers = [place for place, item in enumerate(body) if item.kind == "number"]
    if len(numbers) != 1 or not all(_is_beside(body, place, numbers[0]) for place in range(len(body))):
        return frozenset()
    values = body[numbers[0]].values
    return frozenset(-value for value in values) if negative and items[0].text == "-" else values


def last_number(text: str) -> Reading:
    """The last number of a text in words, or what it is a part of, as the 2 of 4√2 is."""
    text = plain(_around_last_digit(text))
    items = _items(text)
    numbers = [place for place, item in enumerate(items) if item.kind == "number"]
    if not numbers:
        return Reading()
    number = _judged(items, numbers[-1])
    if number.values:
        return Reading(values=number.values)
    start, stop = _brackets(items, numbers[-1])
    if start is not None and stop is not None and _is_in_tuple(items, numbers[-1]):
        return Reading(formula=formula(text[items[start].start : items[stop].end]))
    begin = max(text.rfind(space, 0, number.start) for space in " \n\t") + 1
    after = re.compile(r"\s|$").search(text, number.end)
    assert after is not None, "a text ends"
    return Reading(formula=formula(text[begin : after.start()].strip(".,;!?\"'")))


def first_number(text: str) -> frozenset[Fraction]:
    """The number that a line begins with, before words that tell what it counts."""
    items = _items(plain(text[:LONGEST]))
    place = next((place for place, item in enumerate(items) if item.kind == "number"), None)
    if place is None or any(item.kind == "word" and item.text in JOINING for item in items[place + 1 : place + 2]):
        return frozenset()
    if place + 1 < len(items) and items[place + 1].kind != "word":
        return frozenset()
    return _judged(items, place).values


def _around_last_digit(text: str) -> str:
    """As much of a text as can belong to its last number, from the beginning of a word."""
    digits = re.search(rf"[\d{''.join(VULGAR)}]", text[::-1])
    if digits is None:
        return ""
    end = len(text) - digits.start()
    begin = max(0, end - LONGEST)
    if begin:
        space = re.compile(r"\s").search(text, begin, end)
        begin = space.end() if space else begin
    return text[begin : end + LONGEST]


def has_words(text: str) -> bool:
    """True if a text is more than a formula: it has a word of two letters or more that is no function or unit."""
    return any(
        item.kind == "word" and len(item.text) > 1 and item.text.lower() not in JOINING | FUNCTIONS | SHORT_UNITS
        for item in _items(plain(text[:LONGEST]), formula=True)
    )


def formula(text: str) -> str:
    """What is more than a number, as it is compared with another such text: without spaces. Empty for anything else."""
    text = text.strip().rstrip(".")
    if len(text) > LONGEST:
        return ""
    text = plain(text)
    items = _items(text)
    is_formula = len(items) > 1 and any(character.isdigit() for character in text)
    return re.sub(r"\s+", "", text) if is_formula else ""


def plain(text: str) -> str:
    """A text with LaTeX's fractions, spaces and fonts as people type them, and without currencies."""
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text.translate(CHARACTERS))
    text = re.sub(r"(?<=\d)(?:\\[,! ]|\{,\}|\u00a0)(?=\d{3})", ",", text)
    text = re.sub(r"\\[,;:! ()\[\]]", " ", text).replace("\u00a0", " ").replace("~", " ")
    text = re.sub(r"\\([%$#&_|])", r"\1", text).replace("$", "").replace("\\{", "⦃").replace("\\}", "⦄")
    text = FRACTION.sub(_slashed, text)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda raised: f"^{{{raised.group().translate(RAISED)}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉₊₋]+", lambda lowered: f"_{{{lowered.group().translate(RAISED)}}}", text)
    text = re.sub(f"(\\d?)([{''.join(VULGAR)}])", lambda part: f"{part[1]} {VULGAR[part[2]]}".lstrip(), text)
    text = re.sub(r"\\([A-Za-z]+)\*?", lambda command: COMMANDS.get(command[1], command.group()), text)
    text = re.sub(r"\^ ?(?:\{ ?° ?\}|°)", "°", text)
    text = re.sub(r"(?<=[\d)])\*\*(?=[\d(-])", "^", text)  # a power of Python; elsewhere ** is bold
    return re.sub(r"\*\*|__", "", text)


def _slashed(fraction: re.Match[str]) -> str:
    outer, *parts = fraction.groups(default="")
    top_sign, top, _, top_digit, bottom_sign, bottom, _, bottom_digit = parts
    negative = [outer.strip(), top_sign, bottom_sign].count("-") % 2
    before = fraction.string[fraction.start() - 1 : fraction.start()]
    space = " " if before.isalnum() or before in (")", "}", ".") else ""
    sign = (
        outer if before.isalnum() and not (top_sign or bottom_sign) else ("-" if negative else outer.replace("-", ""))
    )
    after = fraction.string[fraction.end() : fraction.end() + 1]
    return f"{space}{sign}{top or top_digit}/{bottom or bottom_digit}" + (" " if after.isdigit() else "")


def _right_side(text: str) -> str:
    """What stands right of the last `=`, where the left side is one expression; else the whole text."""
    left, equals, right = text.rpartition("=")
    if not equals or re.search(r"[<>!≤≥≠]\s?$|\\[lgn]eq?\s?$", left):
        return text
    flat = re.sub(r"\([^()]*+\)|\{,\}|(?<=\d),(?=\d{3})", "", left)
    if re.search(r"[,;]|\b(?:and|or)\b|\\text\{ ?(?:and|or)", flat) and re.search(r"=|\d\s*[,;]", flat):
        return text
    if re.fullmatch(r"[\s\\{}a-zA-Z]*", right) and re.search(r"\d", left):
        return left  # 5 = x
    return right


def _without_choice(text: str) -> str:
    """The text of an answer without the letter of the choice that it is, as (B)."""
    return re.sub(r"^[\s{]{0,5}\(?[A-H][).:](?=[\s}]|\d|-)", "", text)


def _items(text: str, *, formula: bool = False) -> list[Item]:
    """The items of a plain text.

    Args:
        formula: digits in groups of three with spaces between them are one number.
    """
    if formula:
        groups = r"(?<![\d.,])\d{1,3}(?: \d{3}){1,16}(?![\d,])"
        text = re.sub(groups, lambda number: number.group().replace(" ", ","), text)
    items: list[Item] = []
    end = -1
    for token in TOKEN.finditer(text):
        glued = token.start() == end
        end = token.end()
        if token["brace"]:
            end = end if glued else -1
            continue
        kind: Kind = "sign"
        if token["number"] or token["digits"]:
            kind = "number"
        elif token["word"] or token["script"]:
            kind = "word" if token["word"] else "script"
        values = _values(token) if token["number"] else frozenset[Fraction]()
        items.append(Item(kind=kind, text=token.group(), start=token.start(), end=end, glued=glued, values=values))
    return items


def _values(token: re.Match[str]) -> frozenset[Fraction]:
    """The readings of a number."""
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


def _is_factor(word: Item) -> bool:
    """True if a word beside a number is a variable, a constant or a function, and no unit."""
    text = word.text
    if text in FUNCTIONS or text.startswith("sqrt"):
        return True
    if len(text) == 1:
        return text not in UNIT_LETTERS
    return word.glued and len(text) < 4 and text.lower() not in SHORT_UNITS


def _is_beside(items: list[Item], place: int, number: int) -> bool:
    """True if an item of a formula leaves its only number as it is: a unit, a word, punctuation."""
    item = items[place]
    before = items[place - 1] if place else None
    after = items[place + 1] if place + 1 < len(items) else None
    if item.kind == "number":
        return True
    if item.kind == "script":
        return item.text[0] == "^" and before is not None and before.kind == "word" and not _is_factor(before)
    if item.kind == "word":
        return not (_is_factor(item) or any(character.isdigit() for character in item.text))
    if item.text in "/*-":  # of a unit, as in m/s or 5-inch
        return after is not None and after.kind == "word" and (item.text == "/" or place - 1 != number or item.glued)
    if item.text in "()":
        return True
    if item.text in ",;":
        return after is None
    return (
        item.text in "°≈.?'\"`" or (item.text == "!" and place - 1 != number) or (item.text == ":" and place < number)
    )


def _judged(items: list[Item], place: int) -> Item:
    """The number at a place, without values if it is a part of something else."""
    number = items[place]
    before, after = items[place - 1 :: -1][:3] if place else [], items[place + 1 : place + 4]
    if _is_led(number, before) or _is_followed(after) or _is_in_tuple(items, place):
        return replace(number, values=frozenset())
    return number


def _is_led(number: Item, before: list[Item]) -> bool:
    """True if what stands before a number makes it a part: a root, ±, a sign after a variable, the bracket of f."""
    if not before:
        return False
    sign, *earlier = before
    if sign.kind == "script" or sign.text in ("√", "±", "≤", "≥", "≠", "π", "∞"):
        return sign.kind != "script" or number.glued
    if sign.kind != "sign" or not earlier:
        return False
    if sign.text in ":/" and number.glued and sign.glued:
        return earlier[0].kind == "number"
    if sign.text == "(" and sign.glued:
        return earlier[0].text == "√" or (earlier[0].kind == "word" and _is_factor(replace(earlier[0], glued=False)))
    if sign.text in "+-*/" and (sign.text != "-" or not number.glued or sign.glued or earlier[0].text != "="):
        return _ends_factor(earlier)
    return False


def _ends_factor(before: list[Item]) -> bool:
    """True if a term with a variable, a root or a constant ends here."""
    last = before[0]
    if last.kind == "script":
        return len(before) < 2 or before[1].kind != "word" or _is_factor(before[1])
    if last.kind == "word":
        return _is_factor(last) and last.text not in ("a", "A", "I")
    return last.text in ("√", "π", ")", "]", "|") or last.text.startswith("\\")


def _is_followed(after: list[Item]) -> bool:
    """True if what stands after a number makes it a part: a variable, a power, a root, the minutes of a time."""
    if not after:
        return False
    first, *later = after
    if first.kind == "script" or first.text in ("√", "π", "±", "∞", "!!"):
        return True
    if first.kind == "word":
        if first.glued or len(first.text) > 1:
            return _is_factor(first) and (first.glued or first.text in FUNCTIONS)
        return _is_factor(first) and first.text not in "aAI" and not (later and later[0].kind in ("number", "word"))
    if first.text.startswith("\\"):
        return True
    if first.text == "(":
        return first.glued
    if first.text == ":" and first.glued:
        return bool(later) and later[0].kind == "number" and later[0].glued
    if first.text in "+-*/" and later:
        return _begins_factor(later, spaced=not first.glued)
    return False


def _begins_factor(after: list[Item], *, spaced: bool) -> bool:
    first = after[0]
    if first.kind == "word":
        return _is_factor(replace(first, glued=False)) and not (spaced and first.text in "aAI")
    return first.text in ("√", "π", "(") or first.text.startswith("\\")


def _brackets(items: list[Item], place: int) -> tuple[int | None, int | None]:
    """Places of the brackets around a number, if there are some near it."""
    reach = range(max(0, place - MAX_TUPLE), min(len(items), place + MAX_TUPLE))
    start = next((at for at in reversed(reach[: place - reach.start]) if items[at].text in "([⦃"), None)
    stop = next((at for at in reach[place - reach.start :] if items[at].text in ")]⦄"), None)
    return start, stop


def _is_in_tuple(items: list[Item], place: int) -> bool:
    """True if a number stands in brackets with other numbers, and nothing else: a pair, a set, an interval."""
    start, stop = _brackets(items, place)
    if start is None or stop is None:
        return False
    inner = items[start + 1 : stop]
    return any(item.text in ",;" for item in inner) and all(
        item.kind == "number" or item.text in (",", ";", "-", "π", "∞") for item in inner
    )
