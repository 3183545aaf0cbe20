"""Keywords of JSON schemas that xgrammar passes over without a word, so that an answer may break its schema.

Where xgrammar warns of what it passes over, the trial refuses the form (`serving.replica.trial_process`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

IGNORED = (
    *("not", "if", "dependentRequired", "dependentSchemas", "dependencies", "$recursiveRef", "$dynamicRef"),
    *("contains", "minContains", "maxContains", "multipleOf"),
)
"""Keywords that are never enforced."""
HEADS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
"""Keywords beside which no other keyword is enforced; of several, the first one is."""
LIMITS = {
    "string": ("minLength", "maxLength", "pattern"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "array": ("minItems", "maxItems"),
    "object": ("required", "minProperties", "maxProperties", "patternProperties", "propertyNames"),
}
"""Keywords that are enforced only where the type is known."""
MEMBERS = {
    "array": ("items", "prefixItems", "unevaluatedItems"),
    "object": ("properties", "additionalProperties", "unevaluatedProperties"),
}
"""Keywords from which the type is concluded, if it is not given."""
CONSTRAINTS = {keyword for keywords in (*LIMITS.values(), *MEMBERS.values()) for keyword in keywords}
MAX_REFERENCES = 8
"""How many references are followed to find a type."""
Types = frozenset[str]


@dataclass(frozen=True, kw_only=True)
class IgnoredKeyword:
    """A keyword that would not be enforced."""

    path: str
    """Path of its schema in the whole schema, as `properties/a`; empty for the whole schema."""
    problem: str
    """The keyword, and what can be done, as a clause for people."""


def ignored_keyword(root: Any) -> IgnoredKeyword | None:
    """Returns a keyword of a schema that an answer may break, or None. The schema may be any JSON value."""
    references: set[str] = set()
    stack = [("", root)]
    while stack:
        path, schema = stack.pop()
        if not isinstance(schema, dict):
            continue
        if (problem := _problem(schema, root)) is not None:
            return IgnoredKeyword(path=path, problem=problem)
        head = _head(schema)
        if head == "$ref":
            reference = schema["$ref"]
            if isinstance(reference, str) and reference not in references:
                references.add(reference)
                stack.append((reference.removeprefix("#").strip("/"), _referenced(reference, root)))
        elif head not in ("const", "enum"):
            stack += [(f"{path}/{name}".strip("/"), inner) for name, inner in _subschemas(schema)]
    return None


def _problem(schema: dict[str, Any], root: Any) -> str | None:
    for keyword in IGNORED:
        if keyword in schema:
            return f"{keyword} is not enforced"
    if schema.get("uniqueItems"):
        return "uniqueItems is not enforced"
    head = _head(schema)
    if head is not None:
        return _problem_beside(head, schema, root)
    types = _types(schema, root)
    for type_name, keywords in LIMITS.items():
        for keyword in keywords:
            if keyword in schema and types is None:
                return f'{keyword} is not enforced without the type; add "type": "{type_name}"'
    properties, required = schema.get("properties", {}), schema.get("required")
    if isinstance(required, list) and isinstance(properties, dict):
        for name in required:
            if isinstance(name, str) and name not in properties:
                return f"required is enforced only for names in properties, and {name[:100]!r} is not there"
    return None


def _problem_beside(head: str, schema: dict[str, Any], root: Any) -> str | None:
    for keyword in schema:
        if keyword in CONSTRAINTS or (keyword in HEADS and keyword != head):
            return f"{keyword} is not enforced beside {head}"
    allowed, types = _given_types(schema), _types({head: schema[head]}, root)
    if allowed is not None and types is not None and not types <= allowed | _integers(allowed):
        return f"type is not enforced beside {head}"
    return None


def _head(schema: dict[str, Any]) -> str | None:
    return next((keyword for keyword in HEADS if keyword in schema), None)


def _subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the schemas directly inside a schema, with their paths."""
    for keyword in ("properties", "patternProperties"):
        if isinstance(schemas := schema.get(keyword), dict):
            yield from ((f"{keyword}/{name}", inner) for name, inner in schemas.items())
    for keyword in ("prefixItems", "anyOf", "oneOf", "allOf"):
        if isinstance(schemas := schema.get(keyword), list):
            yield from ((f"{keyword}/{index}", inner) for index, inner in enumerate(schemas))
    for keyword in ("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems"):
        if keyword in schema:
            yield keyword, schema[keyword]


def _types(schema: Any, root: Any, num_references: int = 0) -> Types | None:
    """Returns the types of a schema's values; None if it leaves the type open."""
    if not isinstance(schema, dict) or num_references > MAX_REFERENCES:
        return None
    if isinstance(reference := schema.get("$ref"), str):
        return _types(_referenced(reference, root), root, num_references + 1)
    if "const" in schema:
        return frozenset({_type_of(schema["const"])})
    if isinstance(values := schema.get("enum"), list):
        return frozenset(map(_type_of, values))
    for keyword in ("anyOf", "oneOf", "allOf"):
        if isinstance(branches := schema.get(keyword), list):
            types = [_types(branch, root, num_references + 1) for branch in branches]
            return None if None in types else frozenset(name for some in types for name in some or ())
    if (given := _given_types(schema)) is not None:
        return given
    return next(
        (frozenset({name}) for name, keywords in MEMBERS.items() if any(word in schema for word in keywords)), None
    )


def _given_types(schema: dict[str, Any]) -> Types | None:
    given = schema.get("type")
    if isinstance(given, str):
        return frozenset({given})
    return frozenset(name for name in given if isinstance(name, str)) if isinstance(given, list) else None


def _integers(types: Types) -> Types:
    """Returns the type of integers, which are numbers too, if numbers are allowed."""
    return frozenset({"integer"} if "number" in types else ())


def _type_of(value: Any) -> str:
    """Returns the name of a JSON value's type."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return "integer"
    return {str: "string", float: "number", list: "array", dict: "object"}[type(value)]


def _referenced(reference: str, root: Any) -> Any:
    """Returns the schema to which a reference within the schema points; None if there is none."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    value = root
    for segment in reference.split("/")[1:]:
        name = segment.replace("~1", "/").replace("~0", "~")
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return value
