"""What is wrong with a configuration, in the words of who writes YAML."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from alignment.keys_elsewhere import replacement_of
from alignment.passwords import without_passwords
from alignment.settings.old_names import other_names
from alignment.settings.section import Section, sections_of


def explain(error: ValidationError, kind: type[Section], tree: dict[str, Any]) -> list[str]:
    """One line per problem: where, what, and the nearest known name for an unknown key."""
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        *parents, key = problem["loc"] or ("the whole file",)
        # pydantic names the alternatives of a union as if they were keys, as in `target_modules.tuple[str, ...].0`.
        path = [str(name) for name in problem["loc"] if "[" not in str(name)]
        location, message = ".".join(_written_keys(path, tree)) or "the whole file", _message(problem, kind, path)
        if problem["type"] == "extra_forbidden":
            section = ".".join(name for name in path[:-1] if not name.isdecimal())
            known_keys = _fields(kind, parents, tree)
            deeper_section = _other_sections_hint(kind, path[-1], f"{section}.") if section else ""
            replacement = replacement_of(path[-1], section) if kind.is_run else ""
            hint = deeper_section or replacement or _dots_hint(path[-1]) or _other_sections_hint(kind, path[-1], "")
            message = f"unknown key{hint or nearest(str(key), known_keys)}"
        elif problem["type"] == "missing":
            message = "is required and missing"
        else:
            message += _input_text(problem["input"])
        # Two problems of one value are those of a union's alternatives: what it should be, or what else.
        if location in lines and message != lines[location]:
            message = f"{lines[location].rpartition(' (given: ')[0] or lines[location]}; or {message}"
        lines[location] = message
    return [without_passwords(f"{location}: {message}") for location, message in lines.items()]


def _written_keys(path: list[str], tree: Any) -> list[str]:
    """The same path by the names that the file has for its keys, which may be old names or synonyms."""
    keys = []
    for name in path:
        key = name
        if isinstance(tree, dict):
            key = next((other for other in (name, *other_names(name)) if other in tree), name)
            tree = tree.get(key)
        elif isinstance(tree, list) and name.isdecimal() and int(name) < len(tree):
            tree = tree[int(name)]
        else:
            tree = None
        keys.append(key)
    return keys


def _message(problem: ErrorDetails, kind: type[Section], path: list[str]) -> str:
    """What is wrong with a value, in the words of who writes YAML."""
    value, text = problem["input"], problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "tuple_type":
        example = f", as [{', '.join(item.strip() for item in value.split(','))}]" if isinstance(value, str) else ""
        return f"a list is wanted{example}"
    if problem["type"] not in ("model_type", "dict_type") or not isinstance(value, str):
        return text
    sections = [kind]
    for name in path:
        fields = [section.model_fields[name] for section in sections if name in section.model_fields]
        sections = [section for field in fields for section in sections_of(field.annotation)]
    keys = [key for section in sections for key in ("path", "url", "name") if key in section.model_fields]
    hint = f", as {path[-1]}: {{{keys[0]}: {value}}}" if keys else ""
    return f"Input should be a valid dictionary, a section{hint}"


def _dots_hint(name: str) -> str:
    section, dot, key = name.rpartition(".")
    return f"; dots are for the command line, a file has sections: `{section}: {{{key}: …}}`" if dot else ""


def _other_sections_hint(kind: type[Section], name: str, prefix: str) -> str:
    """Names the sections below `prefix` that have a key of this name; empty if none has."""
    paths = [path for path in _keys(kind, "") if path.endswith(f".{name}") and path.startswith(prefix)]
    return f"; here it is {' or '.join(paths[:3])}" if paths else ""


def _keys(kind: type[Section], section: str) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield section + name
        inner = sections_of(field.annotation)
        if inner and not issubclass(inner[0], kind) and get_origin(field.annotation) not in (tuple, dict):
            yield from _keys(inner[0], f"{section}{name}.")


def _input_text(value: Any) -> str:
    return f" (given: {value!r})" if isinstance(value, str | int | float | bool | None) else ""


def _fields(kind: type[Section], parents: list[Any], tree: dict[str, Any]) -> list[str]:
    """Names that would have been known at the place of an unknown key."""
    for key in parents:
        if key in kind.model_fields:
            kind = kind.section_class(key, tree.get(key))
    return list(kind.model_fields)


def nearest(name: str, known_names: Sequence[str], *, only_match: bool = False) -> str:
    """What a name may have meant, as the end of a sentence: the nearest known one, or else all of them.

    Args:
        only_match: whether to say nothing if none is near.
    """
    matches = difflib.get_close_matches(name, known_names, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return "" if only_match else f"; known are {', '.join(known_names)}"
