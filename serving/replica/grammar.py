"""Forms of answers that requests ask for (JSON schemas, regular expressions, grammars, tools), and their limits.

Native code compiles them. It recurses and multiplies: some forms that fit into a request kill its process, or keep it
busy for minutes. So the size of forms is limited where requests come in (`check_structured_output`), and what an engine
would compile (`forms_of`) is compiled on trial first (`serving.replica.trial`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from serving.config import LimitsConfig
from serving.replica.schema_keywords import ignored_keyword
from serving.schema import RequestError

FORM_FIELDS = ("response_format", "structured_outputs", "tools")
"""Fields of a request from which grammars are made."""
FORMAT_FIELDS = {
    "text": {"type"},
    "json_object": {"type"},
    "json_schema": {"type", "json_schema"},
    "structural_tag": {"type", "format", "structures", "triggers"},
}
"""Members of `response_format`, by its type."""
SCHEMA_FIELDS = {"name", "description", "schema", "strict"}
"""Members of `response_format.json_schema`."""
OUTPUT_FIELDS = {"json", "regex", "choice", "grammar", "json_object", "structural_tag"} | {
    *("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"),
}
"""Members of `structured_outputs`."""
TAG_SCHEMAS = ("json_schema", "schema")
"""Members of a structural tag that hold a schema."""
MAX_WORD = 1000
"""Most characters of a text that ends an answer, or that must not be in it."""
BRACKET = re.compile(r"[()\[\]{}]")
REPEAT = re.compile(r"\{(\d+)(?:,(\d*))?\}")
MAX_DIGITS = 9
PROSE = frozenset({"description", "title", "$comment"})
"""Members of a schema whose texts are for people: only their characters are counted."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What an engine would compile."""

    kind: Literal["json", "regex", "ebnf", "lark", "structural_tag"]
    text: str
    is_needed: bool = True
    """Whether the answer depends on it, so that a form that cannot be compiled has to be refused."""
    is_exact: bool = True
    """Whether it is refused if the compiler passes over a part of it, which an answer may then break."""


@dataclass(frozen=True, kw_only=True)
class FormSize:
    """How much there is to compile in a form."""

    num_chars: int
    """Characters of all its texts, names included."""
    depth: int
    """Levels of lists and objects, together with the levels of brackets in a text."""
    num_parts: int
    """Members of lists and objects, and alternatives (`|`) in texts."""
    max_repeat: int
    """Largest number in braces of a text, as 129 in `a{1,129}`."""


def check_structured_output(body: dict[str, Any], limits: LimitsConfig) -> None:
    """Refuses a request from which the engine would have to compile more than the limits allow.

    Raises:
        RequestError: 400 with the figure and the limit.
    """
    for field in FORM_FIELDS:
        if (form := body.get(field)) is not None:
            _check_size(field, form_size(form, limits), limits)
    _check_words("stop", body.get("stop"), limits.max_stop)
    _check_words("bad_words", body.get("bad_words"), limits.max_bad_words)
    _check_count("the number of tokens in logit_bias", body.get("logit_bias"), limits.max_logit_bias)
    _check_count("the number of stop_token_ids", body.get("stop_token_ids"), limits.max_logit_bias)


def check_enforceable(body: dict[str, Any]) -> None:
    """Refuses a request within the limits whose forms have a part that would be passed over.

    Raises:
        RequestError: 400 with the member or the keyword.
    """
    _check_members(body)
    for field, schema in _schemas_of(body):
        if (ignored := ignored_keyword(schema)) is not None:
            where = f" at {ignored.path[:200]}" if ignored.path else ""
            message = f"The schema in {field} cannot be kept{where}: {ignored.problem}."
            raise RequestError(400, message, code="unsupported_parameter", param=field)


def forms_of(body: dict[str, Any]) -> list[Form]:
    """Returns all forms that vLLM would compile for a request within the limits; imports vLLM for some of them."""
    forms = [*_forms_of_format(body.get("response_format")), *_forms_of_tools(body)]
    structured_outputs = body.get("structured_outputs")
    if isinstance(structured_outputs, dict):
        forms += [form for field in structured_outputs if (form := _form(field, structured_outputs[field])) is not None]
    return forms


def _forms_of_format(format: Any) -> list[Form]:
    if not isinstance(format, dict):
        return []
    if format.get("type") == "structural_tag":
        return [Form(kind="structural_tag", text=json.dumps(format))]
    schema = format.get("json_schema")
    if format.get("type") != "json_schema" or not isinstance(schema, dict) or schema.get("schema") is None:
        return []
    return [Form(kind="json", text=json.dumps(schema["schema"]))]


def _forms_of_tools(body: dict[str, Any]) -> list[Form]:
    """Returns the schemas of the tools that an answer has to follow: tools that it has to call, and strict tools."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    if not isinstance(tools, list) or choice == "none":
        return []
    functions = [
        tool["function"] for tool in tools if isinstance(tool, dict) and isinstance(tool.get("function"), dict)
    ]
    is_forced = choice == "required" or isinstance(choice, dict)
    schemas = [
        function["parameters"]
        for function in functions
        if isinstance(function.get("parameters"), dict) and (is_forced or function.get("strict"))
    ]
    # Tools come as they are published, for models that read their schemas and are not held to all of them.
    return [Form(kind="json", text=json.dumps(schema), is_needed=is_forced, is_exact=False) for schema in schemas]


def _form(field: str, value: Any) -> Form | None:
    """Returns the form of one field of `structured_outputs`; None for a field from which nothing is compiled."""
    if field == "json" and isinstance(value, str | dict):
        return Form(kind="json", text=value if isinstance(value, str) else json.dumps(value))
    if field == "regex" and isinstance(value, str):
        return Form(kind="regex", text=value)
    if field == "structural_tag" and isinstance(value, str):
        return Form(kind="structural_tag", text=value)
    if field == "choice" and isinstance(value, list) and all(isinstance(choice, str) for choice in value):
        from vllm.v1.structured_output.utils import choice_as_grammar

        return Form(kind="ebnf", text=choice_as_grammar(value))
    if field == "grammar" and isinstance(value, str):
        from vllm.v1.structured_output.utils import grammar_is_likely_lark

        return Form(kind="lark" if grammar_is_likely_lark(value) else "ebnf", text=value)
    return None


def _check_members(body: dict[str, Any]) -> None:
    """Refuses members that vLLM would pass over, as unknown fields of a request are refused."""
    format, outputs = body.get("response_format"), body.get("structured_outputs")
    if isinstance(format, dict):
        kind = format.get("type")
        if kind == "json_object" and format.get("schema") is not None:
            message = "response_format of the type json_object takes no schema; send it with the type json_schema."
            raise RequestError(400, message, code="unsupported_parameter", param="response_format.schema")
        if isinstance(kind, str) and kind in FORMAT_FIELDS:
            _check_names("response_format", format, FORMAT_FIELDS[kind])
        if isinstance(schema := format.get("json_schema"), dict):
            _check_names("response_format.json_schema", schema, SCHEMA_FIELDS)
    if isinstance(outputs, dict):
        _check_names("structured_outputs", outputs, OUTPUT_FIELDS)


def _check_names(field: str, members: dict[str, Any], known: set[str]) -> None:
    for name, value in members.items():
        if value is not None and name not in known:
            path = f"{field}.{name[:100]}"
            raise RequestError(400, f"Unknown parameter: {path!r}.", code="unknown_parameter", param=path)


def _schemas_of(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the JSON schemas that an answer has to follow, each with the field that holds it."""
    format, outputs = body.get("response_format"), body.get("structured_outputs")
    tags: list[tuple[str, Any]] = []
    if isinstance(format, dict):
        if format.get("type") == "structural_tag":
            tags.append(("response_format", format))
        elif format.get("type") == "json_schema" and isinstance(schema := format.get("json_schema"), dict):
            yield "response_format", schema.get("schema")
    if isinstance(outputs, dict):
        yield "structured_outputs", _parse(outputs.get("json"))
        tags.append(("structured_outputs", _parse(outputs.get("structural_tag"))))
    for field, tag in tags:
        yield from ((field, member.value) for member in _members(tag) if member.name in TAG_SCHEMAS)


def _parse(form: Any) -> Any:
    """Returns the value of a JSON text; None for a text that is no JSON, which the compiler refuses."""
    if not isinstance(form, str):
        return form
    try:
        return json.loads(form)
    except (ValueError, RecursionError):
        return None


def form_size(form: Any, limits: LimitsConfig) -> FormSize:
    """Measures a form, which may be any JSON value.

    It stops at more characters or parts than the limits allow, so that it takes a few milliseconds at most.
    """
    num_chars = depth = num_parts = max_repeat = 0
    for member in _members(form):
        value = member.value
        if isinstance(value, list | dict):
            num_parts += len(value)
            depth = max(depth, member.level + 1)
        elif isinstance(value, str):
            num_chars += len(value)
            if member.name not in PROSE and num_chars <= limits.max_form_chars:
                depth = max(depth, member.level + _bracket_depth(value))
                num_parts += value.count("|")
                max_repeat = max(max_repeat, _largest_repeat(value))
        if num_chars > limits.max_form_chars or num_parts > limits.max_form_parts:
            break
    return FormSize(num_chars=num_chars, depth=depth, num_parts=num_parts, max_repeat=max_repeat)


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A value in a form, or the name of one."""

    level: int
    """Number of lists and objects around it."""
    name: str
    """Its name in its object; empty for members of lists, and for names."""
    value: Any


def _members(form: Any) -> Iterator[_Member]:
    """Yields a form and everything in it."""
    stack = [_Member(level=0, name="", value=form)]
    while stack:
        member = stack.pop()
        yield member
        level, value = member.level + 1, member.value
        if isinstance(value, dict):
            stack += [_Member(level=level, name="", value=name) for name in value]
            stack += [_Member(level=level, name=name, value=inner) for name, inner in value.items()]
        elif isinstance(value, list):
            stack += [_Member(level=level, name="", value=inner) for inner in value]


def _bracket_depth(text: str) -> int:
    """Returns the most brackets that are open at once in a text, of whatever kind, and escaped or not."""
    depth = deepest = 0
    for bracket in BRACKET.findall(text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _largest_repeat(text: str) -> int:
    """Returns the largest number of a repeat `{m}`, `{m,}` or `{m,n}` in a text; 0 if there is no repeat."""
    counts = (count for braces in REPEAT.findall(text) for count in braces if count)
    return max((int(count[:MAX_DIGITS]) for count in counts), default=0)


def _check_size(field: str, size: FormSize, limits: LimitsConfig) -> None:
    for measure, value, limit in (
        ("characters", size.num_chars, limits.max_form_chars),
        ("levels of nesting (of brackets in its texts too)", size.depth, limits.max_form_nesting),
        ("members and alternatives", size.num_parts, limits.max_form_parts),
        ("times a part repeated in braces", size.max_repeat, limits.max_form_repeat),
    ):
        if value > limit:
            raise RequestError(400, f"{field} has {value} {measure} or more, and at most {limit} are compiled here.")


def _check_words(field: str, words: Any, limit: int) -> None:
    _check_count(f"the number of texts in {field}", words, limit)
    texts = [word for word in (words if isinstance(words, list) else [words]) if isinstance(word, str)]
    longest = max((len(text) for text in texts), default=0)
    if longest > MAX_WORD:
        raise RequestError(400, f"A text in {field} has {longest} characters, and at most {MAX_WORD} are taken.")


def _check_count(name: str, members: Any, limit: int) -> None:
    """Refuses too many members. The engine says what is wrong with a value that is neither a list nor an object."""
    if isinstance(members, list | dict) and len(members) > limit:
        raise RequestError(400, f"{name} is {len(members)}, and at most {limit} here.")
