"""The requests of the benchmark, and how long they take."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving.bench.servers import Server

if TYPE_CHECKING:
    import httpx

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name three animals that live in the sea.",
    "How does a bicycle stay upright?",
    "What should I cook with rice and eggs?",
    "Explain what a prime number is.",
    "Who wrote Romeo and Juliet?",
    "How do I boil an egg?",
)


@dataclass(frozen=True, kw_only=True)
class Load:
    """How many requests are sent, and of which size."""

    requests: int
    """Chats in one round of one server."""
    concurrency: int
    """Requests in progress at a time."""
    tokens: int
    """Tokens of every answer."""


@dataclass(kw_only=True)
class Timings:
    """How long the requests of one kind took."""

    seconds: list[float] = field(default_factory=list)
    """Of each request, until the end of its answer."""
    first_token_s: list[float] = field(default_factory=list)
    """Of each streamed request, until the first token."""
    rates: list[float] = field(default_factory=list)
    """Requests per second, of each round."""
    num_failed: int = 0

    def to_json(self) -> dict[str, float | int]:
        """The figures of the benchmark's last line."""
        return {
            "requests_per_second": round(statistics.median(self.rates), 3) if self.rates else 0.0,
            **quantiles("", self.seconds),
            **(quantiles("first_token_", self.first_token_s) if self.first_token_s else {}),
            "failed": self.num_failed,
        }


def quantiles(name: str, seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile, under names that begin with `name`; nothing if there are no values."""
    if not seconds:
        return {}
    values = sorted(seconds)
    p99 = values[min(len(values) - 1, int(len(values) * 0.99))]
    return {f"{name}p50_s": round(statistics.median(values), 4), f"{name}p99_s": round(p99, 4)}


async def run_concurrently(tasks: Sequence[Awaitable[None]], load: Load) -> float:
    """Runs all tasks, `load.concurrency` at a time; returns how many ended per second."""
    semaphore = asyncio.Semaphore(load.concurrency)

    async def run(task: Awaitable[None]) -> None:
        async with semaphore:
            await task

    start_s = time.perf_counter()
    await asyncio.gather(*map(run, tasks))
    return len(tasks) / (time.perf_counter() - start_s)


async def chat(
    client: httpx.AsyncClient, server: Server, load: Load, timings: Timings, ids: list[str] | None = None
) -> None:
    """Sends one streamed chat with an answer of `load.tokens` tokens.

    Args:
        timings: gets the request's times.
        ids: gets the answer's id when it has ended, since feedback on an unfinished answer is refused; the newest 100
            are kept.
    """
    body = question(server, load.tokens)
    start_s, first_token_s, id = time.perf_counter(), None, ""
    async with client.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=server.headers) as reply:
        if reply.status_code != 200:
            timings.num_failed += 1
            return
        async for line in reply.aiter_lines():
            if first_token_s is None and '"content":"' in line and '"content":""' not in line:
                first_token_s = time.perf_counter() - start_s
            if not id and line.startswith("data: {"):
                id = json.loads(line.removeprefix("data: "))["id"]
    if ids is not None:
        ids[:] = [*ids[-99:], id]
    timings.seconds.append(time.perf_counter() - start_s)
    timings.first_token_s.append(timings.seconds[-1] if first_token_s is None else first_token_s)


def question(server: Server, num_tokens: int) -> dict[str, Any]:
    """The body of a request for a streamed chat with an answer of a fixed number of tokens."""
    return {
        "model": server.model,
        "messages": [{"role": "user", "content": f"{random.choice(QUESTIONS)} ({random.randrange(10**6)})"}],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0.7,
    }


async def rewards(client: httpx.AsyncClient, server: Server, timings: Timings) -> None:
    """Sends a request for the rewards of two answers."""
    messages = [{"role": "user", "content": random.choice(QUESTIONS)}]
    item = {"messages": messages, "completions": ["I do not know.", "That is a good question: it depends."]}
    await _post(client, server, "/v1/rewards", {"items": [item]}, timings)


async def feedback(client: httpx.AsyncClient, server: Server, ids: list[str], timings: Timings) -> None:
    """Sends a thumb for one of the answers."""
    body = {"kind": "thumb", "id": random.choice(ids), "up": random.random() < 0.5}
    await _post(client, server, "/v1/feedback", body, timings)


async def _post(client: httpx.AsyncClient, server: Server, path: str, body: dict[str, Any], timings: Timings) -> None:
    start_s = time.perf_counter()
    reply = await client.post(server.url + path, json=body, headers=server.headers)
    timings.num_failed += reply.status_code != 200
    timings.seconds.append(time.perf_counter() - start_s)
