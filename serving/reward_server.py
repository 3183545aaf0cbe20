"""`raylign reward-server`: a trained reward model behind HTTP, for runs whose workers have no room for it.

request ─► key ─► body limit ─► schema ─► queue ─► the model's thread: all that waits, together ─► reply

It uses the schema of `alignment.rewards.remote`, and runs without Ray: one process, one model.
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
from typing import Annotated, Any

import typer
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from alignment.errors import ConfigError, RewardError
from alignment.groups import Completion, Group, Message
from alignment.models.folders import model_source
from alignment.rewards import Reward, Scorer, Unreadable, check_rewards
from alignment.rewards.model import RewardModel
from alignment.rewards.remote import ScoredItem, ScoreItem, ScoreReply, ScoreRequest, key_from
from alignment.settings.load import check_config
from serving.http.origins import check_local
from serving.launch import refuse_busy_port
from serving.schema import RequestError, error_reply, parse_json

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
    start = time.monotonic()
    scorer = _load(model, device, dtype, max_length, batch_tokens)
    model_thread = ModelThread(scorer, max_waiting=max_waiting)
    limits = Limits(max_items=max_items, max_body_bytes=int(max_body_mib * 2**20))
    typer.echo(f"Ready after {time.monotonic() - start:.0f} s: POST http://{host}:{port}/score")
    import uvicorn

    # No access log and no debug pages: neither may hold what people ask.
    uvicorn.run(
        KeyMiddleware(application(model_thread, limits), key),
        host=host,
        port=port,
        access_log=False,
        log_level="warning",
    )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one request."""

    max_items: int
    max_body_bytes: int


def application(model_thread: ModelThread, limits: Limits) -> FastAPI:
    """Builds the application with its two routes. They check no key: `KeyMiddleware` has to stand in front."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get(PUBLIC)
    async def healthz() -> Response:
        """Says whether the model's thread answers."""
        alive = model_thread.is_alive
        return JSONResponse({"status": "ok" if alive else "dead"}, status_code=200 if alive else 503)

    @app.post("/score")
    async def score(request: Request) -> Response:
        """Returns the rewards of completions."""
        body = await _read_body(request, limits.max_body_bytes)
        futures = model_thread.submit(_parse_request(body, limits.max_items).items)
        answers = await asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
        reply = ScoreReply(items=tuple(item for items in answers for item in items))
        return Response(reply.model_dump_json(exclude_none=True), media_type="application/json")

    @app.exception_handler(RequestError)
    async def on_request_error(_: Request, error: RequestError) -> Response:
        retry = {"Retry-After": "1"} if error.reply.status == 503 else None
        return Response(error.reply.body, error.reply.status, retry, media_type="application/json")

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> Response:
        return Response(error_reply(error.status_code, str(error.detail)).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def on_bug(_: Request, __: Exception) -> Response:
        return Response(error_reply(500, "Internal error.").body, 500, media_type="application/json")

    return app


class KeyMiddleware:
    """Refuses every request without the key, except those for the health check."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        """`key`: None lets everyone on this machine ask, but no web page that a browser shows."""
        self._app = app
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["type"] == "http" and scope["path"] != PUBLIC:
                self._admit(scope)
        except RequestError as error:
            reply = error.reply
            headers = {"WWW-Authenticate": "Bearer"} if reply.status == 401 else {}
            await Response(reply.body, reply.status, headers, media_type="application/json")(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        """Checks the key of a request.

        Raises:
            RequestError: 401, the key is missing or wrong; 403, no key is needed and a page elsewhere asks.
        """
        if self._key is None:
            check_local(scope["headers"])
            return
        authorization = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (authorization[0] if len(authorization) == 1 else b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key, self._key):
            raise RequestError(401, "A valid key is needed: Authorization: Bearer KEY.")


class ModelThread:
    """The one thread that uses the model. Completions that arrive while it works are rated together afterwards."""

    def __init__(self, scorer: Scorer, *, max_waiting: int) -> None:
        """`max_waiting`: most completions that may wait."""
        self._scorer = scorer
        self._max_waiting = max_waiting
        self._queue: queue.SimpleQueue[_QueuedItems] = queue.SimpleQueue()
        self._num_waiting, self._lock = 0, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="reward model", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, items: Sequence[ScoreItem]) -> list[Future[list[ScoredItem]]]:
        """Queues items. Items with the same prompt are one group, whose prompt is computed once.

        Returns:
            A future for the items of each prompt.

        Raises:
            RequestError: 503, too many completions wait already.
        """
        with self._lock:
            # A request that is larger than the limit is rated when no other request waits.
            if self._num_waiting and self._num_waiting + len(items) > self._max_waiting:
                raise RequestError(503, "Too many completions are waiting. Try again later.")
            self._num_waiting += len(items)
        entries = [_QueuedItems(items=prompt_items, future=Future()) for prompt_items in _by_prompt(items)]
        for entry in entries:
            self._queue.put(entry)
        return [entry.future for entry in entries]

    def _run(self) -> None:
        while True:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            for entry, answer in zip(batch, self._rate([entry.items for entry in batch]), strict=True):
                if entry.future.set_running_or_notify_cancel():
                    entry.future.set_result(answer)
            with self._lock:
                self._num_waiting -= sum(len(entry.items) for entry in batch)

    def _rate(self, batch: list[list[ScoreItem]]) -> list[list[ScoredItem]]:
        """Rates all groups together. If that fails, it rates each group, and then each item, to find the fault."""
        groups = [_group(items) for items in batch]
        try:
            rewards = self._scorer.score(groups)
        except RewardError:
            return [self._rate_alone(items) for items in batch]
        except Exception:  # for example, memory runs out: the thread must not end, and the client may send less
            logger.exception("The reward model failed on %d completions", sum(map(len, batch)))
            return [[ScoredItem(id=item.id, error="model_failed") for item in items] for items in batch]
        return [
            _answers(items, group, group_rewards)
            for items, group, group_rewards in zip(batch, groups, rewards, strict=True)
        ]

    def _rate_alone(self, items: list[ScoreItem]) -> list[ScoredItem]:
        """Rates the items of one prompt one by one."""
        if len(items) > 1:
            return [answer for item in items for answer in self._rate_alone([item])]
        try:
            ((rewards,), group) = self._scorer.score([_group(items)]), _group(items)
        except Unreadable:
            return [ScoredItem(id=items[0].id, error="too_long")]
        except RewardError:
            return [ScoredItem(id=items[0].id, error="not_scorable")]
        return _answers(items, group, rewards)


@dataclass(frozen=True, kw_only=True)
class _QueuedItems:
    """Items of one prompt that wait, and the future of their rewards."""

    items: list[ScoreItem]
    future: Future[list[ScoredItem]]


def _by_prompt(items: Sequence[ScoreItem]) -> list[list[ScoreItem]]:
    items_by_prompt: dict[Any, list[ScoreItem]] = {}
    for item in items:
        items_by_prompt.setdefault((item.prompt, item.messages), []).append(item)
    return list(items_by_prompt.values())


def _group(items: list[ScoreItem]) -> Group:
    text, messages = items[0].prompt, items[0].messages or ()
    prompt = (
        tuple(Message(role=message.role, content=message.content) for message in messages) if text is None else text
    )
    completions = tuple(Completion(text=item.completion, truncated=item.truncated) for item in items)
    return Group(id="request", prompt=prompt, completions=completions)


def _answers(items: list[ScoreItem], group: Group, rewards: Sequence[Reward]) -> list[ScoredItem]:
    problem, numbers = check_rewards(group, rewards)
    if problem:
        return [ScoredItem(id=item.id, error="not_finite") for item in items]
    return [ScoredItem(id=item.id, reward=number) for item, number in zip(items, numbers, strict=True)]


def _key(host: str, no_key: bool) -> str | None:
    """Returns the key that clients must send; None for a server that is meant to be open.

    Raises:
        ConfigError: there is no key, and an open server was not asked for, or would be open to other machines.
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
    model_source(model)  # a wrong folder is told before torch, which takes seconds, is loaded

    import torch

    settings = {"name": "model", "path": model, "dtype": dtype, "max_length": max_length, "on_unreadable": "fail"}
    config = check_config({**settings, "micro_batch_tokens": batch_tokens}, kind=RewardModel)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch_device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {device} is not a device: {error}") from error
    return config.build(torch_device)


async def _read_body(request: Request, limit: int) -> bytes:
    """Returns a request's body; raises RequestError if it is larger than the limit, or too slow."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise RequestError(413, f"The request body is larger than {limit} bytes.")
    except TimeoutError as error:
        raise RequestError(408, f"The request was not complete after {BODY_TIMEOUT_S:g} seconds.") from error
    return bytes(body)


def _parse_request(body: bytes, max_items: int) -> ScoreRequest:
    """Parses a request; raises RequestError, which names what is wrong and does not quote it."""
    try:
        request = ScoreRequest.model_validate(parse_json(body))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()[:5]]
        raise RequestError(400, f"The request is not valid. {'; '.join(problems)}"[:1000]) from error
    if len(request.items) > max_items:
        raise RequestError(400, f"A request may have {max_items} items at most, and this one has {len(request.items)}.")
    return request
