"""Forms of answers that would kill or stall what compiles them are refused before anything compiles them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from serving.config import LimitsConfig
from serving.replica.grammar import check_structured_output, form_size
from serving.schema import RequestError

LIMITS = LimitsConfig()


def format_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def tools_of(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}


def pattern(text: str) -> dict[str, Any]:
    return {"type": "string", "pattern": text}


ORDINARY = {
    "type": "object",
    "description": "Smiles :( and {200} and | as people | write them",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 200},
        "size": {"enum": ["small", "large"]},
        "tags": {"type": "array", "items": pattern(r"^[a-z]{1,64}(-[a-z0-9]{1,32}){0,4}$"), "maxItems": 1000},
        "where": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"x": {"type": "number"}}}]},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"response_format": None, "tools": None, "stop": None, "logit_bias": None},
        {"response_format": {"type": "json_object"}},
        format_of(ORDINARY),
        tools_of(ORDINARY),
        {"structured_outputs": {"regex": r"\d{3}-\d{4}"}},
        {"structured_outputs": {"grammar": 'root ::= "a" root | "b"'}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"stop": ["a", "b"], "bad_words": ["c"], "logit_bias": {"1": -100}},
        format_of({"enum": [f"value {number}" for number in range(1000)]}),
    ],
)
def test_what_clients_ordinarily_ask_for_passes(body: dict[str, Any]) -> None:
    check_structured_output(body, LIMITS)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (format_of(pattern("(" * 60_000 + "a" + ")" * 60_000)), "characters"),
        (format_of(pattern("(" * 20_000 + "a" + ")" * 20_000)), "nesting"),
        (format_of({"properties": {"a": pattern("[" * 20_000)}}), "nesting"),
        (format_of({"patternProperties": {"{" * 20_000: {}}}), "nesting"),
        (tools_of(pattern("(" * 20_000)), "nesting"),
        ({"structured_outputs": {"regex": "(" * 20_000}}, "nesting"),
        ({"structured_outputs": {"json": '{"a":' * 10_000}}, "nesting"),
        ({"structured_outputs": {"grammar": "root ::= " + "(" * 20_000}}, "nesting"),
        ({"structured_outputs": {"structural_tag": "[" * 20_000}}, "nesting"),
        ({"response_format": {"type": "structural_tag", "format": {"pattern": "(" * 20_000}}}, "nesting"),
        (format_of({"enum": list(range(100_000))}), "members"),
        (format_of({"properties": {f"p{number}": {"type": "string"} for number in range(3500)}}), "members"),
        (format_of({"anyOf": [{}] * 6000}), "members"),
        (format_of(pattern("|".join("abc" * 3000))), "members"),
        ({"structured_outputs": {"choice": ["a"] * 6000}}, "members"),
        (format_of(pattern("a{1,129}")), "repeated"),
        (format_of({"patternProperties": {"^x{500}$": {}}}), "repeated"),
        ({"structured_outputs": {"regex": "[0-9]{1000,}"}}, "repeated"),
        ({"structured_outputs": {"regex": "a{" + "9" * 5000 + "}"}}, "repeated"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 1001}, "stop"),
        ({"bad_words": ["x"] * 1000}, "bad_words"),
        ({"bad_words": ["x" * 5000]}, "bad_words"),
        ({"logit_bias": {str(number): 1 for number in range(2000)}}, "logit_bias"),
        ({"stop_token_ids": [1] * 2000}, "stop_token_ids"),
    ],
)
def test_what_would_kill_or_stall_a_compiler_is_refused_with_figure_and_limit(
    body: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RequestError) as refused:
        check_structured_output(body, LIMITS)
    assert refused.value.reply.status == 400
    assert reason in refused.value.reply.body and "at most" in refused.value.reply.body


@pytest.mark.parametrize(
    "form", [7, "text", [], {"type": 5}, {"json_schema": "x"}, [None, 1.5, True], {"tools": [[]]}, {"regex": None}]
)
def test_a_form_of_any_type_is_measured(form: Any) -> None:
    for field in ("response_format", "structured_outputs", "tools"):
        check_structured_output({field: form}, LIMITS)
    for field in ("stop", "bad_words", "logit_bias", "stop_token_ids"):
        check_structured_output({field: form}, LIMITS)


def test_the_size_of_a_form_by_hand() -> None:
    size = form_size({"a": ["b(c)", "d|e{2,30}"], "description": "((((|{99}"}, LIMITS)
    assert (size.num_chars, size.depth, size.num_parts, size.max_repeat) == (1 + 4 + 9 + 11 + 9, 3, 2 + 2 + 1, 30)


def test_measuring_ends_where_a_form_is_too_large() -> None:
    def seconds(size: int) -> float:
        form = {"enum": ["(" * 50] * size, "pattern": "(" * 40 * size}
        began = time.process_time()
        form_size(form, LIMITS)
        return time.process_time() - began

    assert seconds(80_000) < 10 * seconds(4_000)
