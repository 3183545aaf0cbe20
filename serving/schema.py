"""What the ingress and the engine say to each other: sound requests, and answers or refusals in OpenAI's form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

Route = Literal["chat", "completions", "tokenize", "detokenize"]
TOKEN_ROUTES: tuple[Route, ...] = ("tokenize", "detokenize")
"""Those that ask for no answer of the model."""

NONCHARACTER = re.compile("[\ufdd0-\ufdd2]")
"""Of Unicode, and no text's: `alignment.data.control_tokens` fences with them what stands for something else."""
TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
"""A text in JSON."""
CODES = {
    401: "invalid_api_key",
    403: "insufficient_permissions",
    404: "not_found",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    503: "service_unavailable",
    504: "timeout",
}
"""What programs may tell an error by, where nothing says it more exactly."""
PROBLEMS = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
"""The same for pydantic's kinds of problems."""
MAX_DEPTH = 64  # levels of lists and objects; requests use about six
MAX_MEMBERS = 10_000
"""Of one object. Each that a route does not know is a problem of its own, and telling of 100,000 takes seconds."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A whole HTTP answer. It crosses Ray's process borders."""

    status: int
    """HTTP status code."""
    body: str
    """JSON text; empty for a stream."""
    events: str = ""
    """The first events of a stream, which save it a message between processes; the others follow as text."""
    version: str | None = None
    """Of the model that answers: a number, or `base` for the base model of an adapter; None if none does."""
    retry_after_s: float | None = None
    """When it makes sense to ask again; None if it does not."""
    version_s: float = 0.0
    """Seconds that the replica took to find the version that answers."""
    form_s: float = 0.0
    """CPU seconds that compiling the form of the answer on trial took; 0 for one that was known."""
    form_problem: str | None = None
    """Why the form of the answer is refused, as `serving.trial.Outcome`; None if it is not."""


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A replica's answer to a request that it does not take, and of which nothing has begun: another one shall."""

    replica: str
    """Which one says so."""
    moves_to: int | None
    """Number of the version that it changes to; None if it does not hold the version that was asked for."""
    is_broken: bool = False
    """Whether it takes nothing any more, and is about to be restarted."""


class Refused(Exception):
    """A request that is not carried out; `reply` tells the client why."""

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
        self.reply = refusal(status, message, code=code, param=param, retry_after_s=retry_after_s)

    @classmethod
    def by(cls, reply: Reply) -> Refused:
        """The refusal that another process gave."""
        refused = cls(reply.status, "refused")
        refused.reply = reply
        return refused


def refusal(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    retry_after_s: float | None = None,
) -> Reply:
    """An error in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.

    Args:
        code: what programs may tell it by, as `context_length_exceeded`; None takes the status's own, if it has one.
        param: the field of the request that it is about.
    """
    known = code or CODES.get(status)
    error = {"message": message, "type": _error_type(status), "param": param, "code": known}
    return Reply(status=status, body=json.dumps({"error": error}), retry_after_s=retry_after_s)


def invalid(problems: Sequence[Any], body: Any) -> Reply:
    """What pydantic found wrong with a request, without the values, which may be anything and of any length.

    Args:
        problems: `ValidationError.errors()`; those of a body may begin with the place `body`.
        body: what was sent.
    """
    found: dict[tuple[str, ...], list[Any]] = {}
    for problem in problems:
        found.setdefault(_place(problem, body), []).append(problem)
    # Of a value that may be of several kinds, every kind says what it misses: the one that came deepest was meant.
    around = {place[:length] for place in found for length in range(len(place))}
    places = [place for place in found if place not in around]
    told = [
        ": ".join([*filter(None, [".".join(place)]), _joined(problem["msg"] for problem in found[place])])
        for place in places[:5]
    ]
    first = found[places[0]][0]
    code = PROBLEMS.get(first["type"], "invalid_type" if "type" in first["type"] else "invalid_value")
    field = places[0][0][:100] if places[0] else None
    return refusal(400, f"The request is not valid. {'; '.join(told)}"[:1000], code=code, param=field)


def _place(problem: Any, body: Any) -> tuple[str, ...]:
    """Where a problem is: pydantic's place, without the names of the kinds that it tried."""
    parts = list(problem["loc"])
    if parts[:1] != ["body"] and parts[:1] in (["header"], ["query"], ["path"]):
        return tuple(map(str, parts))
    place, value = [], body
    for index, part in enumerate(parts):
        if index == 0 and part == "body":
            continue
        is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_index or (isinstance(value, Mapping) and part in value):
            value = value[part]
        elif problem["type"] != "missing" or index + 1 < len(parts):
            continue
        place.append(str(part))
    return tuple(place)


def _joined(messages: Iterable[str]) -> str:
    """Several kinds that a value may be of, in one sentence."""
    first, *others = dict.fromkeys(messages)
    common = "Input should be "
    return " or ".join([first, *(other.removeprefix(common) for other in others)])


def event(reply: Reply) -> str:
    """The same as one server-sent event, for a stream that has begun."""
    return f"data: {reply.body}\n\n"


def _error_type(status: int) -> str:
    if status >= 500:
        return "server_error"
    known = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return known.get(status, "invalid_request_error")


def check_num_values(body: bytes, limit: int) -> None:
    """Refuses a body that holds more values than it is worth reading; takes milliseconds, whatever is in it.

    Raises:
        Refused: 400 with the limit.
    """
    if _num_separators(body) <= limit:
        return
    num_quotes = body.count(b'"') - body.count(b'\\"')
    # Most of the separators may stand in texts, of which no more are looked at than there may be.
    if num_quotes > 2 * limit or _num_separators(TEXT.sub(b"", body, limit)) > limit:
        raise Refused(400, f"The request body holds more than {limit} values (numbers, texts, lists and objects).")


def _num_separators(body: bytes) -> int:
    return sum(body.count(sign) for sign in (b",", b"[", b"{"))


def sound_json(body: bytes) -> dict[str, Any]:
    """Reads a request's body, and refuses what would break the tokenizer or the engine further on.

    Raises:
        Refused: 400 when it is not strict JSON in UTF-8, not an object, nested deeper than 64 levels, or holds
            NaN, an infinity, a lone surrogate, a NUL character, or an object of more than `MAX_MEMBERS` members.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The request body is not valid JSON in UTF-8.") from error
    if not isinstance(value, dict):
        raise Refused(400, "The request body must be a JSON object.")
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
                    raise Refused(400, f"An object in the request body has more than {MAX_MEMBERS} members.")
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                inner += item
            else:
                _check_leaf(item)
        if not inner:
            return
        level = inner
    raise Refused(400, f"The request body is nested deeper than {MAX_DEPTH} levels.")


def _check_leaf(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):  # 1e999 is valid JSON, and infinite
        raise Refused(400, "A number in the request body is not finite.")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise Refused(400, "A number in the request body does not fit into 64 bits.")
    if isinstance(value, str) and ("\0" in value or _has_lone_surrogate(value)):
        raise Refused(400, "A text in the request body holds a NUL character or half of a surrogate pair.")
    if isinstance(value, str) and NONCHARACTER.search(value):
        raise Refused(400, "A text in the request body holds a noncharacter (U+FDD0 to U+FDD2).")


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
