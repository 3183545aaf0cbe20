"""`raylign reward-server`: a trained reward model behind HTTP, for runs whose workers have no room for it.

request ─► key ─► body limit ─► schema ─► queue ─► the model's thread: all that waits, together ─► reply

It speaks the schema of `alignment.rewards.remote`, and runs without Ray: one process, one model.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from alignment.errors import ConfigError, RewardError
from alignment.rewards import Reward, Scorer, Unreadable, checked
from alignment.rewards.model import RewardModel
from alignment.rewards.remote import ScoredItem, ScoreItem, ScoreReply, ScoreRequest, key_from
from alignment.settings.load import check_config
from serving.guard import check_local
from serving.launch import refuse_busy_port
from serving.schema import Refused, refusal, sound_json

if TYPE_CHECKING:  # torch takes seconds, and --help must not
    from alignment.groups import Group

logger = logging.getLogger(__name__)

KEY_VARIABLE = "RAYLIGN_REWARD_KEY"
LOOPBACK = "127.0.0.1"
PUBLIC = "/healthz"
BODY_TIMEOUT_S = 30.0
"""Seconds that a client may take to send its request."""


def reward_server(
    model: Annotated[str, typer.Argument(help="A run or checkpoint of reward_model, a sequence classifier, a hub id.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network interface.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 8100,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Number format of the weights: auto, bf16 or fp32.")] = "auto",
    max_length: Annotated[int | None, typer.Option(min=1, help="Most tokens that the model reads.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in one forward pass.")] = 8192,
    max_items: Annotated[int, typer.Option(min=1, help="Most completions in a request.")] = 1024,
    max_waiting: Annotated[int, typer.Option(min=1, help="Most completions that wait; more get status 503.")] = 4096,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="Largest request body, in MiB.")] = 8.0,
    no_key: Annotated[bool, typer.Option("--no-key", help=f"Serve everyone who can reach {LOOPBACK}.")] = False,
) -> None:
    """Serve a reward model over HTTP, until Ctrl-C; a run asks it with `rewards: [{name: http, url: …/score}]`.

    Clients send the key in RAYLIGN_REWARD_KEY as `Authorization: Bearer KEY`.
    """
    key = _key(host, no_key)
    refuse_busy_port(host, port)
    started = time.monotonic()
    scorer = _load(model, device, dtype, max_length, batch_tokens)
    asked = ModelThread(scorer, max_waiting=max_waiting)
    limits = Limits(max_items=max_items, max_body_bytes=int(max_body_mib * 2**20))
    typer.echo(f"Ready after {time.monotonic() - started:.0f} s: POST http://{host}:{port}/score")
    import uvicorn

    # No access log and no debug pages: neither may hold what people ask.
    uvicorn.run(Guard(application(asked, limits), key), host=host, port=port, access_log=False, log_level="warning")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may hold."""

    max_items: int
    max_body_bytes: int


def application(asked: ModelThread, limits: Limits) -> FastAPI:
    """The two routes, still open to everyone: `Guard` goes in front."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get(PUBLIC)
    async def healthz() -> Response:
        """The model is loaded and its thread answers."""
        alive = asked.is_alive
        return JSONResponse({"status": "ok" if alive else "dead"}, status_code=200 if alive else 503)

    @app.post("/score")
    async def score(request: Request) -> Response:
        """Rates completions."""
        body = await _body(request, limits.max_body_bytes)
        waiting = asked.submit(_parsed(body, limits.max_items).items)
        answers = await asyncio.gather(*(asyncio.wrap_future(each) for each in waiting))
        reply = ScoreReply(items=tuple(item for answer in answers for item in answer))
        return Response(reply.model_dump_json(exclude_none=True), media_type="application/json")

    @app.exception_handler(Refused)
    async def on_refused(_: Request, error: Refused) -> Response:
        retry = {"Retry-After": "1"} if error.reply.status == 503 else None
        return Response(error.reply.body, error.reply.status, retry, media_type="application/json")

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> Response:
        return Response(refusal(error.status_code, str(error.detail)).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def on_bug(_: Request, __: Exception) -> Response:
        return Response(refusal(500, "Internal error.").body, 500, media_type="application/json")

    return app


class Guard:
    """Lets nothing pass without the key but the health check: what is not known to be public is refused."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        """`key`: None lets everyone on this machine pass, but no page that a browser shows there."""
        self._app = app
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["type"] == "http" and scope["path"] != PUBLIC:
                self._admit(scope)
        except Refused as refused:
            reply = refused.reply
            headers = {"WWW-Authenticate": "Bearer"} if reply.status == 401 else {}
            await Response(reply.body, reply.status, headers, media_type="application/json")(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        """Raises Refused: 401 without the key, or 403 where none is needed and a page elsewhere asks."""
        if self._expected is None:
            check_local(scope["headers"])
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1 or not hmac.compare_digest(given[0], self._expected):
            raise Refused(401, "A valid key is needed: Authorization: Bearer KEY.")


class ModelThread:
    """The one thread that touches the model; what arrives while it works is rated together afterwards."""

    def __init__(self, scorer: Scorer, *, max_waiting: int) -> None:
        """`max_waiting`: completions that may wait."""
        self._scorer = scorer
        self._max_waiting = max_waiting
        self._waiting: queue.SimpleQueue[_Waiting] = queue.SimpleQueue()
        self._count, self._lock = 0, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="reward model", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, items: Sequence[ScoreItem]) -> list[Future[list[ScoredItem]]]:
        """Queues items, those with the same prompt as one group, whose prompt is computed once.

        Raises:
            Refused: 503 when too many wait already.
        """
        with self._lock:
            # A single request larger than the limit is still served when nobody else waits.
            if self._count and self._count + len(items) > self._max_waiting:
                raise Refused(503, "Too many completions are waiting. Try again later.")
            self._count += len(items)
        asked = [_Waiting(items=together, future=Future()) for together in _by_prompt(items)]
        for each in asked:
            self._waiting.put(each)
        return [each.future for each in asked]

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            for each, answer in zip(batch, self._rate([each.items for each in batch]), strict=True):
                if each.future.set_running_or_notify_cancel():
                    each.future.set_result(answer)
            with self._lock:
                self._count -= sum(len(each.items) for each in batch)

    def _rate(self, batch: list[list[ScoreItem]]) -> list[list[ScoredItem]]:
        """Rates everything at once; if that fails, group by group and then item by item, to find what is at fault."""
        groups = [_group(items) for items in batch]
        try:
            given = self._scorer.score(groups)
        except RewardError:
            return [self._rate_apart(items) for items in batch]
        except Exception:  # as when memory runs out: the thread has to live on, and the client may try less at once
            logger.exception("The reward model failed on %d completions", sum(map(len, batch)))
            return [[ScoredItem(id=item.id, error="model_failed") for item in items] for items in batch]
        return [_answers(items, group, each) for items, group, each in zip(batch, groups, given, strict=True)]

    def _rate_apart(self, items: list[ScoreItem]) -> list[ScoredItem]:
        if len(items) > 1:
            return [answer for item in items for answer in self._rate_apart([item])]
        try:
            ((rewards,), group) = self._scorer.score([_group(items)]), _group(items)
        except Unreadable:
            return [ScoredItem(id=items[0].id, error="too_long")]
        except RewardError:
            return [ScoredItem(id=items[0].id, error="not_scorable")]
        return _answers(items, group, rewards)


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """Items of one prompt, and where their answers go."""

    items: list[ScoreItem]
    future: Future[list[ScoredItem]]


def _by_prompt(items: Sequence[ScoreItem]) -> list[list[ScoreItem]]:
    together: dict[Any, list[ScoreItem]] = {}
    for item in items:
        together.setdefault((item.prompt, item.messages), []).append(item)
    return list(together.values())


def _group(items: list[ScoreItem]) -> Group:
    from alignment.groups import Completion, Group, Message

    turns = tuple(Message(role=turn.role, content=turn.content) for turn in items[0].messages or ())
    completions = tuple(Completion(text=item.completion, truncated=item.truncated) for item in items)
    return Group(id="request", prompt=turns if items[0].prompt is None else items[0].prompt, completions=completions)


def _answers(items: list[ScoreItem], group: Group, rewards: Sequence[Reward]) -> list[ScoredItem]:
    problem, numbers = checked(group, rewards)
    if problem:
        return [ScoredItem(id=item.id, error="not_finite") for item in items]
    return [ScoredItem(id=item.id, reward=number) for item, number in zip(items, numbers, strict=True)]


def _key(host: str, no_key: bool) -> str | None:
    """The key that clients must send, or None for a server that is meant to be open.

    Raises:
        ConfigError: there is no key, and an open server was not asked for or would be open to other machines.
    """
    if no_key and host != LOOPBACK:
        raise ConfigError(f"--no-key is for --host {LOOPBACK}; on {host} every machine that reaches it could ask")
    if no_key:
        return None
    try:
        return key_from(KEY_VARIABLE)
    except ConfigError as error:
        raise ConfigError(f"{error}; or give --no-key to serve {LOOPBACK} without one") from error


def _load(model: str, device: str, dtype: str, max_length: int | None, batch_tokens: int) -> Scorer:
    import torch

    settings = {"name": "model", "path": model, "dtype": dtype, "max_length": max_length, "on_unreadable": "fail"}
    config = check_config({**settings, "micro_batch_tokens": batch_tokens}, kind=RewardModel)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {device} is not a device: {error}") from error
    return config.build(place)


async def _body(request: Request, limit: int) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise Refused(413, f"The request body is larger than {limit} bytes.")
    except TimeoutError as error:
        raise Refused(408, f"The request was not complete after {BODY_TIMEOUT_S:g} seconds.") from error
    return bytes(body)


def _parsed(body: bytes, max_items: int) -> ScoreRequest:
    """Reads a request; what is wrong is told by its place, without quoting it."""
    try:
        request = ScoreRequest.model_validate(sound_json(body))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:5]]
        raise Refused(400, f"The request is not valid. {'; '.join(problems)}"[:1000]) from error
    if len(request.items) > max_items:
        raise Refused(400, f"A request may have {max_items} items at most, and this one has {len(request.items)}.")
    return request
