"""What the guard lets through to a route, and what it never does."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.types import Message

from serving.config import LimitsConfig
from serving.feedback.keys import Key
from serving.http.access import LARGE_BYTES, AccessMiddleware
from serving.http.ingress import with_cors
from serving.http.metrics import Metrics
from serving.http.routes import ParsedBodyRoute, audit, feedback, health, openai, rewards, versions
from serving.http.shares import Rate

ANNA = Key(name="anna", role="user")
SECRET = "a secret in /etc/passwd"
GOOD = {"authorization": "Bearer good"}


def who(headers: list[bytes]) -> Key | None:
    return ANNA if headers == [b"Bearer good"] else None


def guarded(
    *, broken: bool = False, origins: tuple[str, ...] | None = None, metrics: Metrics | None = None, **limits: Any
) -> AccessMiddleware:
    """`origins`: pages elsewhere that may ask an endpoint without keys; None for one with keys."""
    app = FastAPI()

    @app.get("/healthz")
    async def healthz() -> str:
        return "ok"

    @app.post("/echo")
    async def echo(request: Request) -> Any:
        assert request.scope["state"]["key"] == ANNA
        return {"sent": request.scope["state"]["json"], "body": json.loads(await request.body())}

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError(SECRET)

    return AccessMiddleware(
        app if not broken else fails,
        authenticate=who if origins is None else lambda _: ANNA,
        is_public=lambda path: path == "/healthz",
        limits=LimitsConfig(**{"answers_in_progress": 32, **limits}),
        local_only=origins is not None,
        cors_origins=origins or (),
        metrics=metrics,
    )


def counted(metrics: Metrics, name: str, label: str) -> dict[str, float]:
    """The samples of a counter by one of its labels."""
    samples = [sample for metric in metrics.collect() for sample in metric.samples if sample.name == name]
    return {sample.labels[label]: sample.value for sample in samples}


def ask(guard: AccessMiddleware, method: str, path: str, **what: Any) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(guard, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, **what)

    return asyncio.run(asked())


def assert_refused(answer: httpx.Response, status: int) -> None:
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert len(answer.content) < 2048
    assert "Traceback" not in answer.text and "/etc" not in answer.text and "File " not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "")],
        [("authorization", "good")],
        [("authorization", "bearer good")],
        [("authorization", "Basic good")],
        [("authorization", "Bearer bad")],
        [("authorization", "Bearer good"), ("authorization", "Bearer good")],
    ],
    ids=["none", "empty", "no-scheme", "lower-case", "basic", "wrong", "twice"],
)
@pytest.mark.parametrize("path", ["/echo", "/nowhere", "/openapi.json", "//healthz", "/healthz/", "/HEALTHZ"])
def test_without_a_valid_key_every_path_but_the_public_ones_is_closed(path: str, headers: list[Any]) -> None:
    answer = ask(guarded(), "POST", path, json={}, headers=headers)
    assert_refused(answer, 401)
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_public_path_needs_no_key() -> None:
    assert ask(guarded(), "GET", "/healthz").json() == "ok"


def test_what_is_sent_to_a_public_path_is_not_read() -> None:
    """Anybody may send there, and reading takes the time of those who have a key."""
    headers = {"content-type": "application/json"}
    assert ask(guarded(), "POST", "/healthz", content=b"[" * 100_000, headers=headers).status_code == 405
    assert ask(guarded(), "GET", "/healthz", content=b"[" * 100_000, headers=headers).json() == "ok"


def test_a_client_that_leaves_while_it_sends_is_counted_as_one() -> None:
    async def scene() -> dict[str, float]:
        metrics = Metrics()

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(_: Message) -> None:
            pass

        headers = [(b"authorization", b"Bearer good"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/echo", "headers": [*headers, (b"content-length", b"9")]}
        await guarded(metrics=metrics)(scope, receive, send)
        return counted(metrics, "raylign_requests_total", "status")

    assert asyncio.run(scene()) == {"499": 1.0}


def test_the_route_gets_the_body_and_what_was_read_from_it() -> None:
    sent = {"a": [1, 2.5, None, "ü"]}
    answer = ask(guarded(), "POST", "/echo", json=sent, headers=GOOD)
    assert answer.json() == {"sent": sent, "body": sent}
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"a": ', 400),
        (b'{"a": "\xff"}', 400),
        (b'{"a": NaN}', 400),
        (b'{"a": 1e999}', 400),
        (b'{"a": "\\ud800"}', 400),
        (b'{"a": "\\u0000"}', 400),
        (b"[1]", 400),
        (b"[" * 5000 + b"]" * 5000, 400),
        (b'{"a":' * 100 + b"1" + b"}" * 100, 400),
        (b'{"a": ' + b"9" * 5000 + b"}", 400),
        (b'{"a": "' + b"x" * 2_000_000 + b'"}', 413),
    ],
    ids=["cut", "utf8", "nan", "inf", "surrogate", "nul", "list", "deep", "nested", "digits", "large"],
)
def test_a_body_that_would_break_something_further_on_is_refused(body: bytes, status: int) -> None:
    headers = GOOD | {"content-type": "application/json"}
    assert_refused(ask(guarded(max_body_mib=1), "POST", "/echo", content=body, headers=headers), status)


@pytest.mark.parametrize(
    "headers",
    [{"content-type": "text/plain"}, {}, {"content-type": "application/json", "content-encoding": "gzip"}],
    ids=["text", "none", "gzip"],
)
def test_only_plain_json_is_read(headers: dict[str, str]) -> None:
    assert_refused(ask(guarded(), "POST", "/echo", content=b"{}", headers=GOOD | headers), 415)


def test_a_body_of_unknown_length_is_counted_as_it_comes() -> None:
    async def pieces() -> Any:
        for _ in range(100):
            yield b"x" * 20_000

    headers = GOOD | {"content-type": "application/json"}
    assert_refused(ask(guarded(max_body_mib=1), "POST", "/echo", content=pieces(), headers=headers), 413)


def test_a_route_that_fails_tells_nobody_how(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    assert_refused(ask(guarded(broken=True, metrics=metrics), "POST", "/fails", json={}, headers=GOOD), 500)
    assert SECRET not in caplog.text and "RuntimeError" in caplog.text
    assert counted(metrics, "raylign_requests_total", "status") == {"500": 1}


def test_who_asks_too_often_is_told_when_to_come_back() -> None:
    metrics = Metrics()
    guard = guarded(requests_per_minute=3, metrics=metrics)
    answers = [ask(guard, "POST", "/echo", json={}, headers=GOOD) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 15 <= int(answers[-1].headers["retry-after"]) <= 20
    assert counted(metrics, "raylign_requests_total", "status") == {"200": 3, "429": 1}


def test_a_bucket_fills_steadily_and_never_beyond_its_size() -> None:
    rate = Rate(2)
    assert [rate.take(100.0), rate.take(100.0)] == [0.0, 0.0]
    assert rate.take(100.0) == pytest.approx(30.0)
    assert rate.take(130.0) == 0.0
    assert [rate.take(1000.0), rate.take(1000.0)] == [0.0, 0.0]
    assert rate.take(1000.0) > 0


def test_a_client_that_goes_away_ends_its_request_whatever_its_headers_say() -> None:
    ended, metrics = asyncio.Event(), Metrics()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def scene() -> None:
        guard = AccessMiddleware(
            slow,
            authenticate=who,
            is_public=lambda _: False,
            limits=LimitsConfig(answers_in_progress=32),
            metrics=metrics,
        )
        messages: list[Message] = [{"type": "http.disconnect"}]

        async def receive() -> Message:
            await asyncio.sleep(0.01)
            return messages[0]

        async def send(_: Message) -> None:
            raise AssertionError("nobody listens any more")

        headers = [(b"authorization", b"Bearer good"), (b"x-request-disconnect-disabled", b"?1")]
        await asyncio.wait_for(
            guard({"type": "http", "method": "GET", "path": "/slow", "headers": headers}, receive, send), 30
        )
        assert ended.is_set()

    asyncio.run(scene())
    assert counted(metrics, "raylign_requests_total", "status") == {"499": 1}
    assert counted(metrics, "raylign_requests_in_progress", "route") == {"none": 0}


@pytest.mark.parametrize("streams", [False, True], ids=["not begun", "streamed"])
def test_an_answer_in_progress_ends_with_its_key(streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.http.access.KEY_CHECK_S", 0.05)
    valid, ended, told, metrics = {"key": True}, asyncio.Event(), [], Metrics()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if streams:
            kind = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": kind})
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def receive() -> Message:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        told.append(message)

    async def scene() -> None:
        guard = AccessMiddleware(
            slow,
            authenticate=lambda _: ANNA if valid["key"] else None,
            is_public=lambda _: False,
            limits=LimitsConfig(answers_in_progress=32),
            metrics=metrics,
        )
        scope = {"type": "http", "method": "GET", "path": "/slow", "headers": [(b"authorization", b"Bearer good")]}
        answering = asyncio.ensure_future(guard(scope, receive, send))
        await asyncio.sleep(0.2)
        assert not answering.done()
        valid["key"] = False
        await asyncio.wait_for(answering, 30)
        assert ended.is_set()

    asyncio.run(scene())
    assert told[0]["status"] == (200 if streams else 401)
    assert b"not valid any more" in told[-1]["body"] and not told[-1].get("more_body")
    assert counted(metrics, "raylign_streams_broken_total", "reason") == ({"key": 1} if streams else {})
    assert counted(metrics, "raylign_requests_total", "status") == {str(told[0]["status"]): 1}


def test_an_answer_that_fails_after_it_has_begun_is_counted_as_broken_off_here() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-model-version", b"7")]})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise RuntimeError(SECRET)

    told: list[Message] = []

    async def receive() -> Message:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        told.append(message)

    metrics = Metrics()
    guard = AccessMiddleware(
        fails, authenticate=who, is_public=lambda _: False, limits=LimitsConfig(answers_in_progress=32), metrics=metrics
    )
    scope = {"type": "http", "method": "GET", "path": "/fails", "headers": [(b"authorization", b"Bearer good")]}
    asyncio.run(guard(scope, receive, send))
    assert [message["type"] for message in told] == ["http.response.start", "http.response.body"]
    assert counted(metrics, "raylign_streams_broken_total", "reason") == {"endpoint": 1}
    assert counted(metrics, "raylign_requests_total", "version") == {"7": 1}


def test_a_body_that_does_not_end_is_given_up() -> None:
    async def scene() -> None:
        guard = guarded(body_timeout_s=0.05)
        said: list[Message] = []

        async def receive() -> Message:
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message: Message) -> None:
            said.append(message)

        headers = [
            (b"authorization", b"Bearer good"),
            (b"content-type", b"application/json"),
            (b"content-length", b"100"),
        ]
        await guard({"type": "http", "path": "/echo", "method": "POST", "headers": headers}, receive, send)
        assert said[0]["status"] == 408

    asyncio.run(scene())


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:9000", "[::1]:8000"])
def test_without_keys_this_machines_own_names_are_answered(host: str) -> None:
    answer = ask(guarded(origins=()), "POST", "/echo", json={"a": 1}, headers={"host": host})
    assert answer.status_code == 200
    page = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
    assert ask(guarded(origins=()), "POST", "/echo", json={"a": 1}, headers=page).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},  # a name that leads here for a moment
        {"host": "127.0.0.1.evil.example:8000"},
        {"host": "localhost:8000@evil.example"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:3000"},  # another program of this machine
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_without_keys_no_page_elsewhere_is_answered(headers: dict[str, str]) -> None:
    sent = {"host": "127.0.0.1:8000", **headers}
    assert_refused(ask(guarded(origins=()), "POST", "/echo", json={"a": 1}, headers=sent), 403)
    assert ask(guarded(origins=()), "GET", "/healthz", headers=sent).status_code == 200


def test_without_keys_a_page_that_is_named_may_ask() -> None:
    headers = {"host": "localhost:8000", "origin": "https://lab.example", "sec-fetch-site": "cross-site"}
    guard = guarded(origins=("https://lab.example",))
    assert ask(guard, "POST", "/echo", json={"a": 1}, headers=headers).status_code == 200
    assert_refused(ask(guard, "POST", "/echo", json={}, headers={**headers, "origin": "https://other.example"}), 403)


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT", "PATCH"])
@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain", "multipart/form-data"])
def test_what_changes_something_wants_json_even_without_a_body(method: str, kind: str | None) -> None:
    headers = GOOD | ({} if kind is None else {"content-type": kind})
    assert_refused(ask(guarded(), method, "/echo", headers=headers), 415)
    answer = ask(guarded(), method, "/echo", headers=GOOD | {"content-type": "application/json; charset=utf-8"})
    assert answer.status_code != 415


STAINLESS = ("arch", "lang", "os", "package-version", "retry-count", "runtime", "runtime-version", "timeout")
"""Of the headers `x-stainless-…`, with which OpenAI's JavaScript client says from a browser, too, what it is."""


def test_browsers_are_told_that_the_headers_of_openais_client_may_be_sent() -> None:
    app: Any = with_cors(guarded(), ("https://lab.example",))
    names = ["authorization", "content-type", *(f"x-stainless-{name}" for name in STAINLESS)]
    asked = {"origin": "https://lab.example", "access-control-request-method": "POST"}
    answer = ask(app, "OPTIONS", "/echo", headers=asked | {"access-control-request-headers": ", ".join(names)})
    assert answer.status_code == 200, answer.text
    allowed = answer.headers["access-control-allow-headers"].lower().split(", ")
    assert set(names) <= set(allowed)


def test_browsers_are_told_which_pages_may_ask() -> None:
    asked = {"origin": "https://lab.example", "access-control-request-method": "POST"}
    wanted = asked | {"access-control-request-headers": "authorization, content-type"}
    app: Any = with_cors(guarded(), ("https://lab.example",))
    answer = ask(app, "OPTIONS", "/echo", headers=wanted)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://lab.example"
    other = ask(app, "OPTIONS", "/echo", headers=wanted | {"origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
    answer = ask(app, "POST", "/echo", json={"a": 1}, headers=GOOD | {"origin": "https://lab.example"})
    assert answer.headers["access-control-allow-origin"] == "https://lab.example"
    assert ask(app, "POST", "/echo", json={}, headers={"origin": "https://lab.example"}).status_code == 401
    assert with_cors(app, ()) is app


def test_a_body_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time would be on the event loop, whatever its size."""
    app = FastAPI()
    router = APIRouter(route_class=ParsedBodyRoute)

    @router.post("/echo")
    async def echo(body: dict[str, Any]) -> Any:
        return body

    async def unread(_: Request) -> Any:
        raise AssertionError("this reads it again")

    app.include_router(router)
    monkeypatch.setattr(Request, "json", unread)
    guard = AccessMiddleware(
        app, authenticate=who, is_public=lambda path: False, limits=LimitsConfig(answers_in_progress=32)
    )
    body = {"text": "word " * LARGE_BYTES, "list": [1, None]}
    assert ask(guard, "POST", "/echo", json=body, headers=GOOD).json() == body


def test_every_route_with_a_body_reads_it_once() -> None:
    modules = (openai, rewards, feedback, versions, audit, health)
    routes = [route for module in modules for route in module.router.routes if isinstance(route, APIRoute)]
    with_body = [route for route in routes if route.body_field is not None]
    assert len(with_body) >= 8
    assert {type(route) for route in with_body} == {ParsedBodyRoute}
