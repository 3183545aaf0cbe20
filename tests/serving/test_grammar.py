"""Forms of answers that would kill or stall what compiles them are refused before anything compiles them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from serving.config import LimitsConfig
from serving.replica.grammar import check_enforceable, check_structured_output, form_size
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


def problem_of(body: dict[str, Any]) -> str:
    with pytest.raises(RequestError) as caught:
        check_enforceable(body)
    assert caught.value.reply.status == 400
    return caught.value.reply.body


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a", "b"]}, "'b' is not there"),
        ({"type": "object", "required": ["b"]}, "'b' is not there"),
        ({"not": {}}, "not is not enforced"),
        ({"if": {"type": "string"}, "then": {"minLength": 3}}, "if is not enforced"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired is not enforced"),
        ({"contains": {"const": 7}}, "contains is not enforced"),
        ({"items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems is not enforced"),
        ({"multipleOf": 7}, "multipleOf is not enforced"),
        ({"minLength": 3}, "minLength is not enforced without the type"),
        (
            {"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": {"type": "integer"}}},
            "minimum is not enforced beside $ref",
        ),
        ({"enum": [1, 2], "minimum": 2}, "minimum is not enforced beside enum"),
        ({"enum": ["a"], "type": "integer"}, "type is not enforced beside enum"),
        (
            {"properties": {"a": {"type": "integer"}}, "anyOf": [{"required": ["a"]}]},
            "properties is not enforced beside",
        ),
        ({"type": "array", "items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"not": {}}}}, "at $defs/a: not is"),
    ],
)
def test_a_schema_of_which_a_part_would_be_passed_over_is_refused(schema: dict[str, Any], problem: str) -> None:
    assert problem in problem_of(format_of(schema)).replace("\\", "")
    assert problem in problem_of({"structured_outputs": {"json": schema}}).replace("\\", "")
    assert problem in problem_of({"structured_outputs": {"json": json.dumps(schema)}}).replace("\\", "")
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}}
    assert problem in problem_of({"response_format": tag}).replace("\\", "")
    check_enforceable(tools_of(schema))


A = {"type": "object", "properties": {"kind": {"const": "a", "type": "string"}}, "required": ["kind"]}


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}], "default": None, "title": "X", "$defs": {"A": A}},
        {"type": "object", "allOf": [{"$ref": "#/$defs/A"}], "description": "x", "$defs": {"A": A}},
        {"type": "string", "enum": ["a", "b"]},
        {"type": ["integer", "null"], "minimum": 3},
        {"type": "number", "const": 1},
        {"type": "object", "properties": {"not": {"type": "string"}, "required": {"enum": [{"not": 1}]}}},
        {"type": "array", "items": {"type": "string"}, "uniqueItems": False},
        {"$ref": "#/$defs/list", "$defs": {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}}}},
        *(True, [], "x", {"properties": []}, {"enum": 5}, {"anyOf": {}}, {"$ref": 3}, {"type": [1]}),
    ],
)
def test_a_schema_that_is_kept_whole_passes(schema: Any) -> None:
    check_enforceable(format_of(schema))


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"response_format": {"type": "json_object", "schema": {"type": "object"}}}, "response_format.schema"),
        ({"response_format": {"type": "text", "foo": 1}}, "response_format.foo"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strickt": True}}},
            "response_format.json_schema.strickt",
        ),
        ({"structured_outputs": {"regex": "a", "foo": 1}}, "structured_outputs.foo"),
    ],
)
def test_a_member_that_nobody_reads_is_refused_by_its_name(body: dict[str, Any], name: str) -> None:
    assert json.loads(problem_of(body))["error"]["param"] == name
