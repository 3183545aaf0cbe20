"""Forms that answers are asked for in (JSON schemas, regular expressions, grammars, tools), before engines see them.

What compiles them is native code that recurses and multiplies: some that fit into a request kill its process, or keep
it busy for minutes. So their size is bounded where requests come in (`check_structured_output`), and what an engine
would compile (`forms_of`) is compiled on trial first (`serving.trial`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from serving.config import LimitsConfig
from serving.schema import Refused

FORM_FIELDS = ("response_format", "structured_outputs", "tools")
"""Fields of a request from which grammars are made."""
MAX_WORD = 1000
"""Characters of a text that ends an answer, or that must not be in it."""
BRACKET = re.compile(r"[()\[\]{}]")
REPEAT = re.compile(r"\{(\d+)(?:,(\d*))?\}")
MAX_DIGITS = 9
PROSE = frozenset({"description", "title", "$comment"})
"""Members of a schema whose texts are for people: only their characters count."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What an engine would compile."""

    kind: Literal["json", "regex", "ebnf", "lark", "structural_tag"]
    text: str
    is_needed: bool = True
    """Whether an answer needs it, so that one that is no form at all has to be refused."""


@dataclass(frozen=True, kw_only=True)
class FormSize:
    """How much there is to compile in a form."""

    chars: int
    """Characters of all texts in it, names included."""
    nesting: int
    """Levels of lists and objects, together with those of brackets in a text."""
    parts: int
    """Members of lists and objects, and alternatives (`|`) in texts."""
    repeat: int
    """Largest number in braces of a text, as 129 in `a{1,129}`."""


def check_structured_output(body: dict[str, Any], limits: LimitsConfig) -> None:
    """Refuses a request from which the engine would have to compile more than the limits allow.

    Raises:
        Refused: 400 with the figure and the limit.
    """
    for field in FORM_FIELDS:
        if (form := body.get(field)) is not None:
            _check_size(field, form_size(form, limits), limits)
    _check_words("stop", body.get("stop"), limits.max_stop)
    _check_words("bad_words", body.get("bad_words"), limits.max_bad_words)
    _check_count("the number of tokens in logit_bias", body.get("logit_bias"), limits.max_logit_bias)
    _check_count("the number of stop_token_ids", body.get("stop_token_ids"), limits.max_logit_bias)


def forms_of(body: dict[str, Any]) -> list[Form]:
    """All that vLLM would compile for a request that keeps to the limits. Imports vLLM for choices and grammars."""
    forms = [*_forms_of_format(body.get("response_format")), *_forms_of_tools(body)]
    structured = body.get("structured_outputs")
    if isinstance(structured, dict):
        forms += [form for field in structured if (form := _form(field, structured[field])) is not None]
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
    """Schemas of the tools that an answer is held to: those that it has to call, and strict ones."""
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
    return [Form(kind="json", text=json.dumps(schema), is_needed=is_forced) for schema in schemas]


def _form(field: str, value: Any) -> Form | None:
    """One field of `structured_outputs`; None for those that nothing is compiled from."""
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


def form_size(form: Any, limits: LimitsConfig) -> FormSize:
    """Measures a form, which may be of any JSON type and hold anything.

    It stops where there are more characters or parts than allowed, so that it never takes longer than a few
    milliseconds.
    """
    chars = nesting = parts = repeat = 0
    for member in _members(form):
        value = member.value
        if isinstance(value, list | dict):
            parts += len(value)
            nesting = max(nesting, member.level + 1)
        elif isinstance(value, str):
            chars += len(value)
            if member.name not in PROSE and chars <= limits.max_form_chars:
                nesting = max(nesting, member.level + _bracket_depth(value))
                parts += value.count("|")
                repeat = max(repeat, _largest_repeat(value))
        if chars > limits.max_form_chars or parts > limits.max_form_parts:
            break
    return FormSize(chars=chars, nesting=nesting, parts=parts, repeat=repeat)


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A value in a form, or the name of one."""

    level: int
    """Lists and objects around it."""
    name: str
    """Under which an object has it; empty for members of lists, and for names."""
    value: Any


def _members(form: Any) -> Iterator[_Member]:
    """A form with everything in it."""
    waiting = [_Member(level=0, name="", value=form)]
    while waiting:
        member = waiting.pop()
        yield member
        level, value = member.level + 1, member.value
        if isinstance(value, dict):
            waiting += [_Member(level=level, name="", value=name) for name in value]
            waiting += [_Member(level=level, name=name, value=inner) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [_Member(level=level, name="", value=inner) for inner in value]


def _bracket_depth(text: str) -> int:
    """Most brackets that are open at a place of a text, whatever their kinds and whether or not they are escaped."""
    depth = deepest = 0
    for bracket in BRACKET.findall(text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _largest_repeat(text: str) -> int:
    """Largest number of a repeat `{m}`, `{m,}` or `{m,n}` in a text; 0 without any."""
    counts = (count for braces in REPEAT.findall(text) for count in braces if count)
    return max((int(count[:MAX_DIGITS]) for count in counts), default=0)


def _check_size(field: str, size: FormSize, limits: LimitsConfig) -> None:
    for measure, value, limit in (
        ("characters", size.chars, limits.max_form_chars),
        ("levels of nesting (of brackets in its texts too)", size.nesting, limits.max_form_nesting),
        ("members and alternatives", size.parts, limits.max_form_parts),
        ("times a part repeated in braces", size.repeat, limits.max_form_repeat),
    ):
        if value > limit:
            raise Refused(400, f"{field} has {value} {measure} or more, and at most {limit} are compiled here.")


def _check_words(field: str, words: Any, limit: int) -> None:
    _check_count(f"the number of texts in {field}", words, limit)
    texts = [word for word in (words if isinstance(words, list) else [words]) if isinstance(word, str)]
    longest = max((len(text) for text in texts), default=0)
    if longest > MAX_WORD:
        raise Refused(400, f"A text in {field} has {longest} characters, and at most {MAX_WORD} are taken.")


def _check_count(name: str, members: Any, limit: int) -> None:
    """Of what is neither a list nor an object, the engine says what is wrong."""
    if isinstance(members, list | dict) and len(members) > limit:
        raise Refused(400, f"{name} is {len(members)}, and at most {limit} here.")
