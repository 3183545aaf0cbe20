"""The checks that every request passes before a route sees it: its key, its size and frequency, and valid JSON.

connection ─► key ─► rate ─► whole body ─► valid JSON ─► the key's share ─► route ─► answer, or the end

It is plain ASGI in front of everything, so that a new route is closed until somebody opens it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import LimitsConfig
from serving.feedback.keys import Key
from serving.http.metrics import NONE, Metrics
from serving.http.origins import check_local
from serving.http.shares import ActiveKeys, KeyShare, Rate, RequestSize, request_size
from serving.replica.grammar import FORM_FIELDS
from serving.schema import Reply, RequestError, check_num_values, error_reply, event, parse_json

logger = logging.getLogger("ray.serve")

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
]

VERSION = b"x-model-version"
KEY_CHECK_S = 2.0
"""Seconds between checks whether the key of an answer in progress is still valid."""
_NOT_VALID_ANY_MORE = "This key is not valid any more."
READS = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing."""

LARGE_BYTES = 65536
"""Bodies above this size are parsed in a thread."""

CLIENT_GONE = 499
"""The status of a request whose client went away before it was answered, as proxies count it."""

Authenticate = Callable[[list[bytes]], Key | None]
"""Finds the key of a request by its `Authorization` headers; None if there is none."""


class AccessMiddleware:
    """Lets requests in or refuses them, and ends the answers whose client or key is gone."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        authenticate: Authenticate,
        is_public: Callable[[str], bool],
        limits: LimitsConfig,
        local_only: bool = False,
        cors_origins: Sequence[str] = (),
        metrics: Metrics | None = None,
        route_of: Callable[[str], str] = lambda path: NONE,
    ) -> None:
        """
        Args:
            authenticate: finds the key of a request.
            is_public: says whether a path needs no key.
            local_only: whether to answer only requests for this machine's own names, and from its own page. Where no
                keys are needed, any page that a browser shows could ask otherwise.
            cors_origins: pages elsewhere that may ask nevertheless, as `https://example.org`.
            metrics: count every request, however it ends.
            route_of: returns the route of a path, as `/v1/models/{name}`; there are few routes.
        """
        self._app = app
        self._authenticate = authenticate
        self._is_public = is_public
        self._limits = limits
        self._local_only = local_only
        self._cors_origins = frozenset(cors_origins)
        self._metrics = metrics or Metrics()
        self._route_of = route_of
        self._max_body_bytes = int(limits.max_body_mib * 2**20)
        self._rates: dict[str, Rate] = {}
        self._shares: dict[str, KeyShare] = {}
        self._active_keys = ActiveKeys()
        self._metrics.track_waiting("key", lambda: sum(share.num_waiting for share in list(self._shares.values())))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._answer_and_count(scope, receive, _Sender(send))

    async def _answer_and_count(self, scope: Scope, receive: Receive, send: _Sender) -> None:
        start, route = time.perf_counter(), self._route_of(scope["path"])
        state = scope.setdefault("state", {})
        try:
            with self._metrics.in_progress(route):
                await self._answer(scope, receive, send)
        finally:  # also when the request is cancelled: Ray Serve cancels it when its proxy has lost the client
            self._metrics.count_request(
                route,
                method=scope["method"],
                status=send.status or CLIENT_GONE,
                version=send.version,
                seconds=time.perf_counter() - start,
                model=state.get("model"),
            )
            is_cut = send.has_begun and not send.has_ended
            reason = send.break_reason or state.get("broken") or ("client" if is_cut else None)
            if reason is not None:
                self._metrics.count_broken_stream(route, version=send.version, reason=reason, model=state.get("model"))

    async def _answer(self, scope: Scope, receive: Receive, send: _Sender) -> None:
        share: KeyShare | None = None
        reply: Reply | None = None
        try:
            start = time.perf_counter()
            scope["state"]["key"] = key = self._admit(scope)
            self._metrics.observe("key", time.perf_counter() - start)
            if key is None:
                await self._carry_out(scope, receive, send, None)
            else:
                share = scope["state"]["share"] = self._share_of(key)
                self._check_rate(key)
                with share.presence():
                    await self._carry_out(scope, receive, send, share)
        except RequestError as error:
            reply = error.reply
        except Exception as error:  # the client must get an answer, and must not get the exception's text
            # The log gets the stack, and not the message, which may quote what was sent.
            stack = "".join(traceback.format_tb(error.__traceback__))
            logger.error("A request failed with %s\n%s", type(error).__name__, stack)
            send.break_reason = "endpoint" if send.has_begun else None
            reply = error_reply(500, "Internal error.")
        if reply is not None:
            if reply.status == 429 and share is not None:
                scope["state"].pop("json", None)  # many requests may be delayed, and the body is freed with the error
                await share.delay_refusal()
            await _send_reply(reply, scope, send)

    async def _carry_out(self, scope: Scope, receive: Receive, send: _Sender, share: KeyShare | None) -> None:
        """Reads a request, and has a route answer it.

        Args:
            share: the share of the request's key; None for a public path, where no body is read, since anybody may
                send there.

        Raises:
            RequestError: the body is refused, or the request is too large beside what its key has in progress.
        """
        app = self._app
        body = b"" if share is None else await self._read_and_check(scope, receive, share)
        if body and share is not None:
            fields = scope["state"]["json"]
            has_form = any(fields.get(field) for field in FORM_FIELDS)
            if has_form:
                share.check_forms(time.monotonic())
            size = request_size(fields, len(body), self._limits)
            app = self._queued_app(share, size, may_wait=len(body) <= LARGE_BYTES, has_form=has_form)
        await _run_while_connected(app, scope, _Replay(body, receive), send, lambda: self._still_admits(scope))

    async def _read_and_check(self, scope: Scope, receive: Receive, share: KeyShare) -> bytes:
        """Returns the body, and puts the parsed body into the request's state.

        Raises:
            RequestError: as `_read_body` and `_parse_body`.
        """
        start = time.perf_counter()
        body = await self._read_body(scope, receive)
        body_s = time.perf_counter() - start
        if body:
            async with share.large_body(body_s) if len(body) > LARGE_BYTES else nullcontext():
                start = time.perf_counter()
                scope["state"]["json"] = await self._parse_body(body)
                body_s += time.perf_counter() - start
        self._metrics.observe("body", body_s)
        return body

    def _queued_app(self, share: KeyShare, size: RequestSize, *, may_wait: bool, has_form: bool) -> ASGIApp:
        """Returns the routes, which answer as soon as the key has room for the request.

        Args:
            may_wait: whether the request may wait for that. It stays in memory meanwhile, so that it has to be small.
            has_form: whether a form has to be compiled for the answer.
        """

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            async with share.slot(size, may_wait=may_wait):
                if has_form:  # the requests before it may have used up the seconds that were left when it came
                    share.check_forms(time.monotonic())
                await self._app(scope, receive, send)

        return answer

    def _admit(self, scope: Scope) -> Key | None:
        """Returns the key of a request; None for a public path.

        Raises:
            RequestError: 401, there is no valid key; 403, no keys are needed and the request comes from a page
                elsewhere.
        """
        if self._is_public(scope["path"]):
            return None
        if self._local_only:
            check_local(scope["headers"], self._cors_origins)
        key = self._authenticate([value for name, value in scope["headers"] if name == b"authorization"])
        if key is None:
            raise RequestError(401, "A valid key is needed: Authorization: Bearer KEY.")
        return key

    def _check_rate(self, key: Key) -> None:
        """Counts a request of a key.

        Raises:
            RequestError: 429, the key asks too often.
        """
        if self._limits.requests_per_minute:
            rate = self._rates.setdefault(key.name, Rate(self._limits.requests_per_minute))
            wait_s = rate.take(time.monotonic())
            if wait_s:
                raise RequestError(429, "This key asks too often. Try again later.", retry_after_s=wait_s)

    async def _parse_body(self, body: bytes) -> dict[str, Any]:
        """Parses a body. A large body is parsed in a thread, while other requests are answered.

        Raises:
            RequestError: as `check_num_values` and `parse_json`.
        """
        check_num_values(body, self._limits.max_body_values)
        return parse_json(body) if len(body) <= LARGE_BYTES else await asyncio.to_thread(parse_json, body)

    def _share_of(self, key: Key) -> KeyShare:
        """Returns the share of a key; a new one if its role has changed."""
        share = self._shares.get(key.name)
        if share is None or share.role != key.role:
            share = self._shares[key.name] = KeyShare(key.name, key.role, self._limits, self._active_keys)
        return share

    def _still_admits(self, scope: Scope) -> bool:
        """Returns whether the key that a request came with is still valid."""
        if scope["state"]["key"] is None:
            return True
        return self._authenticate([value for name, value in scope["headers"] if name == b"authorization"]) is not None

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        """Returns the whole body; empty for requests that have none.

        Raises:
            RequestError: the body is too large, too slow or compressed, or its content type is not JSON.
        """
        headers = dict(scope["headers"])
        is_empty = headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers
        is_json = headers.get(b"content-type", b"").partition(b";")[0].strip().lower() == b"application/json"
        # Also without a body: browsers let a page elsewhere send a form without asking the endpoint first, but no JSON.
        if not is_json and not (is_empty and scope["method"] in READS):
            raise RequestError(415, "Send the header Content-Type: application/json; a body has to be JSON.")
        if is_empty:
            return b""
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise RequestError(415, "Compressed bodies are not read; send plain JSON.")
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                return await self._receive_body(receive, headers)
        except TimeoutError as error:
            raise RequestError(408, f"The request was not complete after {self._limits.body_timeout_s:g} s.") from error

    async def _receive_body(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        max_bytes = self._max_body_bytes
        content_length = headers.get(b"content-length", b"0")
        body = bytearray()
        has_more = True
        while has_more:
            if len(body) > max_bytes or (content_length.isdigit() and int(content_length) > max_bytes):
                raise RequestError(413, f"The request body is larger than {max_bytes} bytes.")
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RequestError(CLIENT_GONE, "The request was not complete.")
            body += message.get("body", b"")
            has_more = message.get("more_body", False)
        if len(body) > max_bytes:
            raise RequestError(413, f"The request body is larger than {max_bytes} bytes.")
        return bytes(body)


class _Sender:
    """Sends an answer with the headers that all answers have, and knows how far it has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        """HTTP status of the answer; None before it has begun."""
        self.version: str | None = None
        self.has_ended = False
        self.break_reason: str | None = None
        """Why the endpoint broke the answer off; None if it did not."""
        self._is_stream = False

    @property
    def has_begun(self) -> bool:
        """Whether the client has the answer's status."""
        return self.status is not None

    async def break_off(self, message: str) -> None:
        """Ends an answer. A client that reads events gets the message as the last event.

        Raises:
            RequestError: 401 with the message, if the answer has not begun.
        """
        if not self.has_begun:
            raise RequestError(401, message)
        self.break_reason = "key"
        final_event = event(error_reply(401, message)).encode() if self._is_stream else b""
        await self._send({"type": "http.response.body", "body": final_event, "more_body": False})

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = dict(message["headers"])
            self.version = headers.get(VERSION, b"").decode() or None
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            message["headers"] = [*message["headers"], *(header for header in HEADERS if header[0] not in headers)]
        elif not message.get("more_body", False):
            self.has_ended = True
        await self._send(message)


class _Replay:
    """Gives the routes the body that was read before, and later the end of the connection."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._message: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive
        self.client_gone = asyncio.Event()

    async def __call__(self) -> Message:
        if self._message is not None:
            message, self._message = self._message, None
            return message
        await self.client_gone.wait()
        return {"type": "http.disconnect"}

    async def watch(self) -> None:
        """Returns when the client has gone away."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.client_gone.set()


async def _run_while_connected(
    app: ASGIApp, scope: Scope, replay: _Replay, send: _Sender, is_admitted: Callable[[], bool]
) -> None:
    """Runs a route until it has answered, or its client has gone away, whatever the client's headers say.

    Args:
        is_admitted: says whether the client's key is still valid.

    Raises:
        RequestError: 401, the client's key was revoked or has expired, and the answer has not begun. An answer that
            has begun is broken off.
    """
    answer_task = asyncio.ensure_future(app(scope, replay, send))
    watch_task = asyncio.ensure_future(replay.watch())
    tasks = {answer_task, watch_task}
    try:
        while not (await asyncio.wait(tasks, timeout=KEY_CHECK_S, return_when=asyncio.FIRST_COMPLETED))[0]:
            if not is_admitted():
                break
        was_admitted = answer_task.done() or watch_task.done()
        if not answer_task.done():
            answer_task.cancel()
            await asyncio.wait({answer_task})
        if not was_admitted:
            await send.break_off(_NOT_VALID_ANY_MORE)
        elif not answer_task.cancelled():
            answer_task.result()
    finally:
        answer_task.cancel()
        watch_task.cancel()
        await asyncio.gather(watch_task, return_exceptions=True)


async def _send_reply(reply: Reply, scope: Scope, send: _Sender) -> None:
    """Sends a reply, unless an answer has begun."""
    if not send.has_begun:
        await as_response(reply)(scope, _receive_disconnect, send)


async def _receive_disconnect() -> Message:
    return {"type": "http.disconnect"}


def as_response(reply: Reply) -> Response:
    """Returns a reply as an HTTP response."""
    headers = {} if reply.version is None else {VERSION.decode(): reply.version}
    if reply.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(reply.retry_after_s))
    if reply.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(reply.body, reply.status, headers, media_type="application/json")
