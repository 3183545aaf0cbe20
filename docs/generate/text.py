"""Markdown from what the code says of itself: types, defaults and docstrings."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COMMAND = "make docs"
"""What writes the pages."""
NOTICE = f"<!-- Written by `{COMMAND}` from the code. Change the code, not this page. -->"
WIDTH = 120

Schema = Mapping[str, Any]
"""A JSON Schema, or a part of OpenAPI's."""


def type_text(schema: Schema, objects: Schema) -> str:
    """A JSON Schema in words, as `integer ≥ 1 or null`.

    Args:
        objects: what it may refer to: a schema with `$defs`, or the schemas of an application by name.
    """
    if "$ref" in schema:
        return _reference_text(reference(schema), objects)
    if "const" in schema or "enum" in schema:
        return join_names([_plain(value) for value in schema.get("enum", [schema.get("const")])], "or")
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(type_text(choice, objects) for choice in schema[key]))
    kind = schema.get("type", "anything")
    if kind == "array" and "prefixItems" in schema:
        return f"list of {', '.join(type_text(item, objects) for item in schema['prefixItems'])}"
    if kind == "array":
        size = _range_text(schema.get("minItems"), schema.get("maxItems"))
        return f"list {f'({size}) ' if size else ''}of {type_text(schema.get('items', {}), objects)}"
    if kind == "object":
        values = schema.get("additionalProperties", True)
        return "mapping" if isinstance(values, bool) else f"mapping of {type_text(values, objects)}"
    if kind == "string":
        size = _range_text(schema.get("minLength"), schema.get("maxLength"))
        pattern = f" matching `{schema['pattern']}`" if "pattern" in schema else ""
        unit = "character" if size.endswith(" 1") else "characters"
        return f"string{f' of {size} {unit}' if size else ''}{pattern}"
    return f"{kind}{_bounds(schema)}"


def _reference_text(name: str, objects: Schema) -> str:
    is_section = "$defs" in objects
    inner = objects["$defs"][name] if is_section else objects[name]
    if inner.get("type") != "object":
        return type_text(inner, objects)
    return "section" if is_section else f"[{name}](#{anchor(name)})"


def reference(schema: Schema) -> str:
    return str(schema["$ref"]).rpartition("/")[2]


def _bounds(schema: Schema) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" {_range_text(schema['minimum'], schema['maximum'])}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    texts = [f"{sign} {_number(schema[key])}" for key, sign in signs.items() if key in schema]
    return f" {', '.join(texts)}" if texts else ""


def _range_text(minimum: float | None, maximum: float | None) -> str:
    if minimum is None:
        return "" if maximum is None else f"at most {_number(maximum)}"
    if maximum is None:
        return f"at least {_number(minimum)}"
    return _number(minimum) if minimum == maximum else f"{_number(minimum)} to {_number(maximum)}"


def _number(value: float) -> str:
    """Whole numbers as such: an application's schema has its bounds as floats."""
    return str(int(value)) if float(value).is_integer() else str(value)


def value_text(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value, ensure_ascii=False)}`"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def join_names(names: Sequence[str], word: str) -> str:
    """Names as code, as `a`, `b` and `c`."""
    *first_items, last_item = [f"`{name}`" for name in names]
    return f"{', '.join(first_items)} {word} {last_item}" if first_items else last_item


def anchor(heading: str) -> str:
    return heading.lower().replace(".", "")


def item(name: str, traits: Iterable[str], description: str | None) -> str:
    """An item of a list, as "* `name` (integer, default `1`): What it means."."""
    trait_text = ", ".join(traits)
    text = f"* `{name}`{f' ({trait_text})' if trait_text else ''}"
    return wrap_text(f"{text}: {line(description)}" if description else text, indent="  ")


def first_paragraph(documented_object: Any) -> str:
    """The first paragraph of a docstring."""
    return line((inspect.getdoc(documented_object) or "").partition("\n\n")[0])


def line(docstring: str) -> str:
    return " ".join(docstring.split())


def wrap_text(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def code_block(text: str) -> str:
    return f"```\n{text.strip()}\n```"


def page_text(blocks: Iterable[str]) -> str:
    """A page: blocks with empty lines between them. What is text is wrapped, and lists, tables and code stay."""
    starts = ("#", "```", "|", "* ", "<")
    return "\n\n".join(block if block.startswith(starts) else wrap_text(block) for block in blocks if block) + "\n"
