"""What every request has to pass before it reaches a route: a key, limits on its size and frequency, sound JSON.

connection ─► key ─► rate ─► whole body ─► JSON that breaks nothing ─► its key's share ─► route ─► answer, or the end

Plain ASGI and in front of everything, so that a new route is closed until somebody opens it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import LimitsConfig
from serving.grammar import FORM_FIELDS
from serving.keys import Key
from serving.meters import NONE, Meters
from serving.schema import Refused, Reply, check_num_values, event, refusal, sound_json
from serving.shares import KeyShare, RequestSize, request_size

logger = logging.getLogger("ray.serve")

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
]

VERSION = b"x-model-version"
KEY_CHECK_S = 2.0
"""How often it is looked whether the key of an answer in progress is still valid."""
_NOT_VALID_ANY_MORE = "This key is not valid any more."
READS = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing."""
HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
"""This machine's own names, with any port: people forward ports."""

LARGE_BYTES = 65536
"""Bodies above this size are read beside the event loop."""

CLIENT_GONE = 499
"""The status of a request whose client went away before it was answered, as proxies count it."""
SLOW_S = 0.5
"""Seconds after which a key that asks for too much is told so."""

Who = Callable[[list[bytes]], Key | None]
"""From the Authorization headers of a request to the key behind them; None if there is none."""


class Guard:
    """Lets in what may come in, and cleans up behind it."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        who: Who,
        is_public: Callable[[str], bool],
        limits: LimitsConfig,
        local_only: bool = False,
        cors_origins: Sequence[str] = (),
        meters: Meters | None = None,
        route_of: Callable[[str], str] = lambda path: NONE,
    ) -> None:
        """
        Args:
            who: finds the key of a request.
            is_public: whether a path needs no key.
            local_only: whether to take requests for this machine's own names alone, and from its own page: where no
                keys are needed, any page that a browser shows could ask otherwise.
            cors_origins: pages elsewhere that may ask all the same, as `https://example.org`.
            meters: count every request, however it ends.
            route_of: the route that a path leads to, as `/v1/models/{name}`: there are few of them.
        """
        self._app = app
        self._who = who
        self._is_public = is_public
        self._limits = limits
        self._local_only = local_only
        self._cors_origins = frozenset(cors_origins)
        self._meters = meters or Meters()
        self._route_of = route_of
        self._max_body_bytes = int(limits.max_body_mib * 2**20)
        self._rates: dict[str, Rate] = {}
        self._shares: dict[str, KeyShare] = {}
        self._meters.waits("key", lambda: sum(share.num_waiting for share in list(self._shares.values())))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._count(scope, receive, _Sender(send))

    async def _count(self, scope: Scope, receive: Receive, send: _Sender) -> None:
        begun, route = time.perf_counter(), self._route_of(scope["path"])
        state = scope.setdefault("state", {})
        try:
            with self._meters.in_progress(route):
                await self._answer(scope, receive, send)
        finally:  # also of what is cancelled, as Ray Serve does when its proxy has lost a client
            self._meters.answered(
                route,
                method=scope["method"],
                status=send.status or CLIENT_GONE,
                version=send.version,
                seconds=time.perf_counter() - begun,
            )
            reason = send.broken or state.get("broken") or ("client" if send.began and not send.has_ended else None)
            if reason is not None:
                self._meters.broke_off(route, version=send.version, reason=reason)

    async def _answer(self, scope: Scope, receive: Receive, send: _Sender) -> None:
        try:
            begun = time.perf_counter()
            scope["state"]["key"] = key = self._admit(scope)
            self._meters.took("key", time.perf_counter() - begun)
            if key is None:
                await self._carry_out(scope, receive, send, None)
            else:
                share = scope["state"]["share"] = self._share(key)
                with share.presence():
                    await self._carry_out(scope, receive, send, share)
        except Refused as refused:
            if refused.reply.status == 429:  # who asks again at once would take the time of others
                await asyncio.sleep(SLOW_S)
            await _say(refused.reply, scope, send)
        except Exception as error:  # the client must get an answer, and must not get the exception's text
            # Where, and not the message, which may quote what was sent.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("A request failed with %s\n%s", type(error).__name__, where)
            send.broken = "endpoint" if send.began else None
            await _say(refusal(500, "Internal error."), scope, send)

    async def _carry_out(self, scope: Scope, receive: Receive, send: _Sender, share: KeyShare | None) -> None:
        """Reads a request, and has a route answer it.

        Args:
            share: of the request's key; None is a public route's, of which nothing is read: anybody may send there.

        Raises:
            Refused: it is not read, or too large beside what its key has in progress.
        """
        app = self._app
        body = b"" if share is None else await self._read_and_check(scope, receive, share)
        if body and share is not None:
            asked = scope["state"]["json"]
            has_form = any(asked.get(field) for field in FORM_FIELDS)
            if has_form:
                share.check_forms(time.monotonic())
            app = self._in_turn(share, request_size(asked, len(body), self._limits), len(body), has_form=has_form)
        await _until_gone(app, scope, _Replay(body, receive), send, lambda: self._still_admits(scope))

    async def _read_and_check(self, scope: Scope, receive: Receive, share: KeyShare) -> bytes:
        """The body, after what it holds was put into the request's state; raises Refused as `_body` and `_json` do."""
        begun = time.perf_counter()
        body = await self._body(scope, receive)
        took_s = time.perf_counter() - begun
        if body:
            async with share.large_body(took_s) if len(body) > LARGE_BYTES else nullcontext():
                begun = time.perf_counter()
                scope["state"]["json"] = await self._json(body)
                took_s += time.perf_counter() - begun
        self._meters.took("body", took_s)
        return body

    def _in_turn(self, share: KeyShare, size: RequestSize, num_bytes: int, *, has_form: bool) -> ASGIApp:
        """The routes, for when the key has room for the request. What waits is kept in memory, and has to be small."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            async with share.place(size, may_wait=num_bytes <= LARGE_BYTES):
                if has_form:  # those before it may have used up what there was when it came
                    share.check_forms(time.monotonic())
                await self._app(scope, receive, send)

        return answer

    def _admit(self, scope: Scope) -> Key | None:
        """The key of a request; None for what needs none.

        Raises:
            Refused: 401 without a valid key, 403 from elsewhere where no keys are needed, 429 when it asks too often.
        """
        if self._is_public(scope["path"]):
            return None
        if self._local_only:
            check_local(scope["headers"], self._cors_origins)
        key = self._who([value for name, value in scope["headers"] if name == b"authorization"])
        if key is None:
            raise Refused(401, "A valid key is needed: Authorization: Bearer KEY.")
        if self._limits.requests_per_minute:
            rate = self._rates.setdefault(key.name, Rate(self._limits.requests_per_minute))
            wait_s = rate.take(time.monotonic())
            if wait_s:
                raise Refused(429, "This key asks too often. Try again later.", retry_after_s=wait_s)
        return key

    async def _json(self, body: bytes) -> dict[str, Any]:
        """What a body holds. A large one is read beside the event loop, where others are answered meanwhile.

        Raises:
            Refused: it holds too much, or what would break something further on.
        """
        check_num_values(body, self._limits.max_body_values)
        return sound_json(body) if len(body) <= LARGE_BYTES else await asyncio.to_thread(sound_json, body)

    def _share(self, key: Key) -> KeyShare:
        share = self._shares.get(key.name)
        if share is None or share.role != key.role:
            share = self._shares[key.name] = KeyShare(key.role, self._limits)
        return share

    def _still_admits(self, scope: Scope) -> bool:
        """Whether the key that a request came with is still valid."""
        if scope["state"]["key"] is None:
            return True
        return self._who([value for name, value in scope["headers"] if name == b"authorization"]) is not None

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body; empty for requests that have none.

        Raises:
            Refused: it is too large, too slow, compressed, or not JSON by its own account.
        """
        headers = dict(scope["headers"])
        is_empty = headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers
        is_json = headers.get(b"content-type", b"").partition(b";")[0].strip().lower() == b"application/json"
        # Also without a body: a page elsewhere may send a form without being asked for leave, and no JSON.
        if not is_json and not (is_empty and scope["method"] in READS):
            raise Refused(415, "Send the header Content-Type: application/json; a body has to be JSON.")
        if is_empty:
            return b""
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refused(415, "Compressed bodies are not read; send plain JSON.")
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                return await self._read(receive, headers)
        except TimeoutError as error:
            raise Refused(408, f"The request was not complete after {self._limits.body_timeout_s:g} s.") from error

    async def _read(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        announced = headers.get(b"content-length", b"0")
        body = bytearray()
        more = True
        while more:
            if len(body) > self._max_body_bytes or (announced.isdigit() and int(announced) > self._max_body_bytes):
                raise Refused(413, f"The request body is larger than {self._max_body_bytes} bytes.")
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(CLIENT_GONE, "The request was not complete.")
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > self._max_body_bytes:
            raise Refused(413, f"The request body is larger than {self._max_body_bytes} bytes.")
        return bytes(body)


def check_local(headers: Sequence[tuple[bytes, bytes]], cors_origins: Collection[str] | None = None) -> None:
    """Refuses what a browser sends for a page that is not this endpoint's own, whatever name leads there.

    Args:
        cors_origins: pages elsewhere that may ask all the same; None where no setting names any.

    Raises:
        Refused: 403, by another name than this machine's, or from a page elsewhere.
    """
    sent: dict[bytes, list[str]] = {}
    for name, value in headers:
        sent.setdefault(name.lower(), []).append(value.decode("latin-1"))
    hosts, origins = sent.get(b"host", []), sent.get(b"origin", [])
    if len(hosts) != 1 or HOST.fullmatch(hosts[0]) is None:
        raise Refused(403, "Without keys, this endpoint answers by the names 127.0.0.1, localhost and [::1] alone.")
    if origins and set(origins) <= set(cors_origins or ()):
        return
    own = {f"http://{hosts[0]}", f"https://{hosts[0]}"}
    if not set(origins) <= own or not set(sent.get(b"sec-fetch-site", [])) <= {"same-origin", "none"}:
        setting = "" if cors_origins is None else "; cors_origins names those that may"
        raise Refused(403, f"Without keys, pages of other origins may not ask here{setting}.")


class Rate:
    """A bucket that fills steadily: so many requests per minute, and that many at once after a pause."""

    def __init__(self, per_minute: int) -> None:
        self._size = float(per_minute)
        self._level = self._size
        self._filled = 0.0

    def take(self, now: float) -> float:
        """Takes one request out; returns the seconds to wait if there is none, else 0."""
        if self._filled:
            self._level = min(self._size, self._level + (now - self._filled) * self._size / 60)
        self._filled = now
        if self._level < 1:
            return (1 - self._level) * 60 / self._size
        self._level -= 1
        return 0.0


class _Sender:
    """Passes an answer on, with the headers that all answers have, and knows how far it has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        """None before it has begun."""
        self.version: str | None = None
        self.has_ended = False
        self.broken: str | None = None
        """Why it was broken off, if it was this side."""
        self._is_stream = False

    @property
    def began(self) -> bool:
        return self.status is not None

    async def break_off(self, reason: str) -> None:
        """Ends an answer; who reads events is told why.

        Raises:
            Refused: 401 with the reason, if the answer has not begun.
        """
        if not self.began:
            raise Refused(401, reason)
        self.broken = "key"
        last = event(refusal(401, reason)).encode() if self._is_stream else b""
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = dict(message["headers"])
            self.version = given.get(VERSION, b"").decode() or None
            self._is_stream = given.get(b"content-type", b"").startswith(b"text/event-stream")
            message["headers"] = [*message["headers"], *(one for one in HEADERS if one[0] not in given)]
        elif not message.get("more_body", False):
            self.has_ended = True
        await self._send(message)


class _Replay:
    """Gives the routes the body that was read already, and after it what the connection says."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._message: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive
        self.gone = asyncio.Event()

    async def __call__(self) -> Message:
        if self._message is not None:
            message, self._message = self._message, None
            return message
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def watch(self) -> None:
        """Returns when the client has gone away."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone.set()


async def _until_gone(
    app: ASGIApp, scope: Scope, replay: _Replay, send: _Sender, is_admitted: Callable[[], bool]
) -> None:
    """Runs a route until it has answered, or its client has gone away, whatever the client's headers say of that.

    Raises:
        Refused: 401 the client's key was revoked or expired meanwhile, and the answer had not begun. One that had is
            broken off.
    """
    answering = asyncio.ensure_future(app(scope, replay, send))
    watching = asyncio.ensure_future(replay.watch())
    waiting = {answering, watching}
    try:
        while not (await asyncio.wait(waiting, timeout=KEY_CHECK_S, return_when=asyncio.FIRST_COMPLETED))[0]:
            if not is_admitted():
                break
        was_admitted = answering.done() or watching.done()
        if not answering.done():
            answering.cancel()
            await asyncio.wait({answering})
        if not was_admitted:
            await send.break_off(_NOT_VALID_ANY_MORE)
        elif not answering.cancelled():
            answering.result()
    finally:
        answering.cancel()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _say(reply: Reply, scope: Scope, send: _Sender) -> None:
    if not send.began:
        await as_response(reply)(scope, _nothing, send)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def as_response(reply: Reply, **more: Any) -> Response:
    """A reply as the HTTP response that it describes."""
    headers = {} if reply.version is None else {VERSION.decode(): reply.version}
    if reply.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(reply.retry_after_s))
    if reply.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(reply.body, reply.status, headers | more, media_type="application/json")
