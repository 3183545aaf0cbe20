"""What is wrong with a configuration, in the words of who writes YAML."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from alignment.keys_elsewhere import replacement_of
from alignment.passwords import without_passwords
from alignment.settings.section import Section, sections_of


def explain(error: ValidationError, kind: type[Section], tree: dict[str, Any]) -> list[str]:
    """One line per problem: where, what, and the nearest known name for an unknown key."""
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        *parents, last = problem["loc"] or ("the whole file",)
        # pydantic names the alternatives of a union as if they were keys, as in `target_modules.tuple[str, ...].0`.
        path = [str(part) for part in problem["loc"] if "[" not in str(part)]
        where, message = ".".join(path) or "the whole file", _message(problem, kind, path)
        if problem["type"] == "extra_forbidden":
            section = ".".join(part for part in path[:-1] if not part.isdecimal())
            known = _fields(kind, parents, tree)
            inside = _elsewhere(kind, path[-1], f"{section}.") if section else ""
            others = replacement_of(path[-1], section) if kind.is_run else ""
            place = inside or others or _dotted(path[-1]) or _elsewhere(kind, path[-1], "")
            message = f"unknown key{place or nearest(str(last), known)}"
        elif problem["type"] == "missing":
            message = "is required and missing"
        else:
            message += _given(problem["input"])
        # Two problems of one value are those of a union's alternatives: what it should be, or what else.
        both = where in lines and message != lines[where]
        lines[where] = f"{lines[where].rpartition(' (given: ')[0] or lines[where]}; or {message}" if both else message
    return [without_passwords(f"{where}: {message}") for where, message in lines.items()]


def _message(problem: ErrorDetails, kind: type[Section], path: list[str]) -> str:
    """What is wrong with a value, in the words of who writes YAML."""
    value, text = problem["input"], problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "tuple_type":
        example = f", as [{', '.join(part.strip() for part in value.split(','))}]" if isinstance(value, str) else ""
        return f"a list is wanted{example}"
    if problem["type"] not in ("model_type", "dict_type") or not isinstance(value, str):
        return text
    fields = kind.model_fields[path[0]].annotation if len(path) == 1 else None
    keys = [key for section in sections_of(fields) for key in ("path", "name") if key in section.model_fields]
    return "Input should be a valid dictionary, a section" + (f", as {path[0]}: {{{keys[0]}: {value}}}" if keys else "")


def _dotted(name: str) -> str:
    section, dot, last = name.rpartition(".")
    return f"; dots are for the command line, a file has sections: `{section}: {{{last}: …}}`" if dot else ""


def _elsewhere(kind: type[Section], name: str, within: str) -> str:
    """Sections that have a key of this name, where it was written in another; empty if none has."""
    places = [place for place in _keys(kind, "") if place.endswith(f".{name}") and place.startswith(within)]
    return f"; here it is {' or '.join(places[:3])}" if places else ""


def _keys(kind: type[Section], section: str) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield section + name
        inner = sections_of(field.annotation)
        if inner and not issubclass(inner[0], kind) and get_origin(field.annotation) is not tuple:
            yield from _keys(inner[0], f"{section}{name}.")


def _given(value: Any) -> str:
    return f" (given: {value!r})" if isinstance(value, str | int | float | bool | None) else ""


def _fields(kind: type[Section], parents: list[Any], tree: dict[str, Any]) -> list[str]:
    """Names that would have been known at the place of an unknown key."""
    for key in parents:
        if key in kind.model_fields:
            kind = kind.section_class(key, tree.get(key))
    return list(kind.model_fields)


def nearest(name: str, known: Sequence[str]) -> str:
    """What a name may have meant: the nearest known one, or all of them; the end of a sentence."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
