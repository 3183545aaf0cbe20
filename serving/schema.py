"""What the ingress and the engine send each other: checked requests, and answers or errors in OpenAI's form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

Route = Literal["chat", "completions", "tokenize", "detokenize"]
TOKEN_ROUTES: tuple[Route, ...] = ("tokenize", "detokenize")
"""The routes that ask for no answer of the model."""

NONCHARACTER = re.compile("[\ufdd0-\ufdd2]")
"""Characters that Unicode gives to no text. `alignment.data.control_tokens` marks with them what it replaces."""
JSON_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
STATUS_CODES = {
    401: "invalid_api_key",
    403: "insufficient_permissions",
    404: "not_found",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    503: "service_unavailable",
    504: "timeout",
}
"""Names of errors for programs, by their status, where no more exact name is given."""
PROBLEM_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
"""Names of errors for programs, by pydantic's type of the problem."""
MAX_DEPTH = 64  # levels of lists and objects; requests use about six
MAX_MEMBERS = 10_000
"""Most members of one object. Each unknown member is a problem of its own, and reporting 100,000 takes seconds."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A whole HTTP answer, or the beginning of a stream. It is sent between Ray's processes."""

    status: int
    """HTTP status code."""
    body: str
    """JSON text; empty for a stream."""
    events: str = ""
    """The first events of a stream, so that they need no message of their own; the other events follow as text."""
    version: str | None = None
    """Version of the model that answers: a number, or `base` for the base model of an adapter; None if none does."""
    retry_after_s: float | None = None
    """Seconds after which it makes sense to ask again; None if it makes no sense."""
    version_s: float = 0.0
    """Seconds that the replica took to choose the version that answers."""
    form_s: float = 0.0
    """CPU seconds that compiling the answer's form on trial took; 0 for a form that was compiled before."""
    form_problem: str | None = None
    """Why the answer's form is refused, as `serving.replica.trial.TrialOutcome`; None if it is not."""


@dataclass(frozen=True, kw_only=True)
class Redirect:
    """A replica's answer to a request that it does not take, so that another replica has to take it.

    Nothing of the request has begun.
    """

    replica: str
    """Name of the replica that answers so."""
    moves_to: int | None
    """Number of the version that it changes to; None if it does not hold the version that was asked for."""
    is_broken: bool = False
    """Whether it takes no request any more, and is about to be restarted."""


class RequestError(Exception):
    """A request that is not carried out. `reply` tells the client why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reply = error_reply(status, message, code=code, param=param, retry_after_s=retry_after_s)

    @classmethod
    def from_reply(cls, reply: Reply) -> RequestError:
        """Makes an error of the reply that another process gave."""
        error = cls(reply.status, "refused")
        error.reply = reply
        return error


def error_reply(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    retry_after_s: float | None = None,
) -> Reply:
    """Returns an error in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.

    Args:
        code: name of the error for programs, as `context_length_exceeded`; None takes the name of the status, if it
            has one.
        param: the field of the request that the error is about.
    """
    error_code = code or STATUS_CODES.get(status)
    error = {"message": message, "type": _error_type(status), "param": param, "code": error_code}
    return Reply(status=status, body=json.dumps({"error": error}), retry_after_s=retry_after_s)


def validation_error_reply(problems: Sequence[Any], body: Any) -> Reply:
    """Returns the error 400 for what pydantic found wrong with a request. It quotes no values, which may be anything.

    Args:
        problems: `ValidationError.errors()`; the locations of problems in a body may begin with `body`.
        body: the body that was sent.
    """
    problems_by_path: dict[tuple[str, ...], list[Any]] = {}
    for problem in problems:
        problems_by_path.setdefault(_path(problem, body), []).append(problem)
    # For a value of several possible types, pydantic reports the problems of each type. The deepest one was meant.
    enclosing_paths = {path[:length] for path in problems_by_path for length in range(len(path))}
    paths = [path for path in problems_by_path if path not in enclosing_paths]
    sentences = []
    for path in paths[:5]:
        field = ".".join(path)
        message = _join_messages(problem["msg"] for problem in problems_by_path[path])
        sentences.append(f"{field}: {message}" if field else message)
    kind = problems_by_path[paths[0]][0]["type"]
    code = PROBLEM_CODES.get(kind, "invalid_type" if "type" in kind else "invalid_value")
    param = paths[0][0][:100] if paths[0] else None
    return error_reply(400, f"The request is not valid. {'; '.join(sentences)}"[:1000], code=code, param=param)


def _path(problem: Any, body: Any) -> tuple[str, ...]:
    """Returns the path of a field: pydantic's location of the problem, without the names of the types that it tried."""
    location = list(problem["loc"])
    if location[:1] != ["body"] and location[:1] in (["header"], ["query"], ["path"]):
        return tuple(map(str, location))
    path, value = [], body
    for index, segment in enumerate(location):
        if index == 0 and segment == "body":
            continue
        is_index = isinstance(value, list) and isinstance(segment, int) and segment < len(value)
        if is_index or (isinstance(value, Mapping) and segment in value):
            value = value[segment]
        elif problem["type"] != "missing" or index + 1 < len(location):
            continue
        path.append(str(segment))
    return tuple(path)


def _join_messages(messages: Iterable[str]) -> str:
    """Returns the problems with several possible types of a value as one sentence."""
    head, *tail = dict.fromkeys(messages)
    prefix = "Input should be "
    return " or ".join([head, *(message.removeprefix(prefix) for message in tail)])


def event(reply: Reply) -> str:
    """Returns a reply as one server-sent event, for a stream that has begun."""
    return f"data: {reply.body}\n\n"


def _error_type(status: int) -> str:
    if status >= 500:
        return "server_error"
    types = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return types.get(status, "invalid_request_error")


def check_num_values(body: bytes, limit: int) -> None:
    """Refuses a body that holds more values than the limit. It takes milliseconds, whatever the body holds.

    Raises:
        RequestError: 400 with the limit.
    """
    if _num_separators(body) <= limit:
        return
    num_quotes = body.count(b'"') - body.count(b'\\"')
    # Most separators may stand in texts. No more texts are removed than the limit allows.
    if num_quotes > 2 * limit or _num_separators(JSON_STRING.sub(b"", body, limit)) > limit:
        raise RequestError(400, f"The request body holds more than {limit} values (numbers, texts, lists and objects).")


def _num_separators(body: bytes) -> int:
    return sum(body.count(sign) for sign in (b",", b"[", b"{"))


def parse_json(body: bytes) -> dict[str, Any]:
    """Parses a request's body, and refuses what the tokenizer or the engine could not take.

    Raises:
        RequestError: 400, the body is not strict JSON in UTF-8, is not an object, is nested deeper than `MAX_DEPTH`
            levels, or holds NaN, an infinity, a lone surrogate, a NUL character, or an object of more than
            `MAX_MEMBERS` members.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "The request body is not valid JSON in UTF-8.") from error
    if not isinstance(value, dict):
        raise RequestError(400, "The request body must be a JSON object.")
    _check_values(value)
    return value


def _not_a_number(text: str) -> NoReturn:
    raise ValueError(text)


def _check_values(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if len(item) > MAX_MEMBERS:
                    raise RequestError(400, f"An object in the request body has more than {MAX_MEMBERS} members.")
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                inner += item
            else:
                _check_leaf(item)
        if not inner:
            return
        level = inner
    raise RequestError(400, f"The request body is nested deeper than {MAX_DEPTH} levels.")


def _check_leaf(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):  # 1e999 is valid JSON, and infinite
        raise RequestError(400, "A number in the request body is not finite.")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise RequestError(400, "A number in the request body does not fit into 64 bits.")
    if isinstance(value, str) and ("\0" in value or _has_lone_surrogate(value)):
        raise RequestError(400, "A text in the request body holds a NUL character or half of a surrogate pair.")
    if isinstance(value, str) and NONCHARACTER.search(value):
        raise RequestError(400, "A text in the request body holds a noncharacter (U+FDD0 to U+FDD2).")


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
