"""The page of every route, from FastAPI's own OpenAPI schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import MagicMock

from alignment.rewards.remote import ScoreReply, ScoreRequest
from docs.generate.text import (
    NOTICE,
    Schema,
    item,
    join_names,
    line,
    page_text,
    reference,
    type_text,
    value_text,
    wrap_text,
)
from serving import reward_server
from serving.config import ServeConfig
from serving.http import ingress
from serving.http.fields import IGNORED, SUPPORTED, UNSUPPORTED
from serving.http.routes import PUBLIC
from serving.http.routes.bodies import ChatBody, CompletionBody
from serving.schema import STATUS_CODES


def http_page() -> str:
    """Every route: method, path, role, what it takes and what it answers."""
    codes = "\n".join(f"| {status} | `{code}` |" for status, code in STATUS_CODES.items())
    blocks = [
        "# HTTP",
        NOTICE,
        "Requests bear `Authorization: Bearer KEY`. A key has one of the roles `user`, `labeller` and `admin`, each of "
        "which may do what those before it may, or the role `monitor`, which may read the metrics alone. Bodies are "
        "JSON, with the header `Content-Type: application/json`. Admins get the OpenAPI schema of the routes at "
        "`GET /openapi.json`.",
        'Errors have OpenAI\'s form: `{"error": {"message", "type", "param", "code"}}`. `code` says what was wrong '
        "with a field of a request (400), or is that of the status:",
        f"| status | `code` |\n|---|---|\n{codes}",
        "## The endpoint: `raylign serve`",
        *_routes(_endpoint()),
        *_fields_of_completions(),
        "## A reward server: `raylign reward-server`",
        *_routes(_reward_server()),
    ]
    return page_text(blocks)


def _endpoint() -> Schema:
    """The OpenAPI schema of the endpoint; its routes depend on little of what they use when they answer."""
    context = MagicMock(config=ServeConfig(checkpoint="model"))
    return ingress.application(context, MagicMock()).openapi()


def _reward_server() -> Schema:
    """The same of a reward server, which reads and writes its bodies itself."""
    schema = reward_server.application(MagicMock(), MagicMock()).openapi()
    objects: dict[str, Any] = {}
    for kind in (ScoreRequest, ScoreReply):
        inner = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        objects |= {**inner.pop("$defs", {}), kind.__name__: inner}
    route = schema["paths"]["/score"]["post"]
    route["requestBody"] = _content({"$ref": "ScoreRequest"})
    route["responses"]["200"] |= _content({"$ref": "ScoreReply"})
    return schema | {"components": {"schemas": objects}}


def _content(schema: Schema) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _routes(schema: Schema) -> Iterator[str]:
    """The routes of an application, and then the objects that they take and answer."""
    objects: Schema = schema.get("components", {}).get("schemas", {})
    routes = [
        (f"{method.upper()} {path}", route)
        for path, methods in schema["paths"].items()
        for method, route in methods.items()
    ]
    for name, route in routes:
        yield f"### `{name}`"
        yield " ".join([*map(_role, route.get("tags", [])), line(route.get("description", ""))])
        yield "\n".join(_parameter(parameter, objects) for parameter in route.get("parameters", []))
        if body := _body(route):
            yield f"Body: {type_text(body, objects)}."
        if answer := _answer(route):
            yield f"Answer: {type_text(answer, objects)}."
    names = _names([[_body(route), _answer(route)] for _, route in routes])
    yield from _objects(names, objects)


def _role(tag: str) -> str:
    return "No key is needed." if tag == PUBLIC else f"Role: `{tag}`."


def _body(route: Schema) -> Schema:
    return _json(route.get("requestBody", {}))


def _answer(route: Schema) -> Schema:
    return next((_json(answer) for status, answer in route["responses"].items() if status.startswith("2")), {})


def _json(message: Schema) -> Schema:
    schema: Schema = message.get("content", {}).get("application/json", {}).get("schema", {})
    return schema


def _parameter(parameter: Schema, objects: Schema) -> str:
    traits = [parameter["in"], *_traits(parameter["schema"], objects, is_required=parameter["required"])]
    return item(parameter["name"], traits, parameter.get("description"))


def _objects(names: list[str], objects: Schema) -> Iterator[str]:
    """The objects of these names, and those that they refer to."""
    reachable_names: set[str] = set()
    while names:
        name = names.pop()
        if name not in reachable_names:
            reachable_names.add(name)
            names += _names(objects[name])
    for name in sorted(reachable_names):
        schema = objects[name]
        if "properties" not in schema:
            continue
        yield f"### {name}"
        yield line(schema.get("description", ""))
        required_fields = schema.get("required", [])
        yield "\n".join(
            item(field, _traits(inner, objects, is_required=field in required_fields), inner.get("description"))
            for field, inner in schema["properties"].items()
        )


def _traits(schema: Schema, objects: Schema, *, is_required: bool) -> list[str]:
    value = schema.get("default")
    default = [] if value is None else [f"default {value_text(value)}"]
    return [type_text(schema, objects), *(["required"] if is_required else default)]


def _names(schema: Any) -> list[str]:
    """The objects that a schema refers to."""
    if isinstance(schema, list):
        return [name for item in schema for name in _names(item)]
    if not isinstance(schema, Mapping):
        return []
    return [reference(schema)] if "$ref" in schema else _names(list(schema.values()))


def _fields_of_completions() -> Iterator[str]:
    """What becomes of OpenAI's and vLLM's other fields."""
    yield "### Other fields of completions"
    yield "Beside the fields above, requests for chats and completions may have these, which reach vLLM as they are:"
    for route in ("chat", "completions"):
        other_fields = sorted(SUPPORTED[route] - set((ChatBody if route == "chat" else CompletionBody).model_fields))
        yield wrap_text(f"* {route}: {join_names(other_fields, 'and')}", indent="  ")
    yield f"These are taken and say nothing here: {join_names(sorted(IGNORED), 'and')}."
    yield "These are refused, unless they ask for what is done anyway:"
    yield "\n".join(item(name, [], f"{reason}.") for name, reason in sorted(UNSUPPORTED.items()))
