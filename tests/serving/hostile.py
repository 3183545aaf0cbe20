"""One client that does what it can to hurt the others, until it is ended: `python hostile.py URL KEY MODEL`."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

PAUSE_S = 0.02
"""After what was refused: the machine that this runs on is also the endpoint's."""
AT_ONCE = 6
"""Of each kind."""
counter = itertools.count()
number_of_answers = itertools.cycle((8, 16))
"""As many as a key may ask for on two cores, and more."""


def chat(model: str, **more: Any) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "x"}], **more}).encode()


def form(model: str, **schema: Any) -> bytes:
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return chat(model, response_format=format, max_tokens=2000)


def kinds(model: str) -> dict[str, Callable[[], bytes]]:
    """Bodies by what is wrong with them."""
    brackets = form(model, type="string", pattern="(" * 60_000 + "a" + ")" * 60_000)
    enum = form(model, enum=[f"value {number}" for number in range(100_000)])
    values = b'{"model": "x", "messages": [' + b"[]," * (4 * 2**20 // 3 - 50) + b"[]]}"
    properties = {f"p{number}": {"type": "string"} for number in range(1500)}
    slow = form(model, type="object", properties=properties, additionalProperties=False).decode()
    stream = chat(model, max_tokens=2000, ignore_eos=True, stream=True)
    return {
        "nested schemas": lambda: brackets,
        "huge enums": lambda: enum,
        "big bodies": lambda: values,
        "slow schemas": lambda: slow.replace('"p7"', f'"q{next(counter)}"').encode(),
        "long streams": lambda: stream,
        "many answers": lambda: chat(model, max_tokens=2000, ignore_eos=True, n=next(number_of_answers)),
        "aborted streams": lambda: stream,
    }


async def send(client: httpx.AsyncClient, kind: str, body: bytes) -> int:
    async with client.stream("POST", "/v1/chat/completions", content=body) as answer:
        async for _ in answer.aiter_bytes():
            if kind == "aborted streams":
                break
    return answer.status_code


async def repeat(client: httpx.AsyncClient, kind: str, body: Callable[[], bytes], statuses: Counter[str]) -> None:
    while True:
        try:
            status = await send(client, kind, body())
        except httpx.HTTPError as error:
            status = 0
            statuses[f"{kind}: {type(error).__name__}"] += 1
        statuses[f"{kind}: {status}"] += 1
        if status != 200:
            await asyncio.sleep(PAUSE_S)


async def main(url: str, key: str, model: str) -> None:
    statuses: Counter[str] = Counter()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits) as client:
        tasks = [
            asyncio.create_task(repeat(client, kind, body, statuses))
            for kind, body in kinds(model).items()
            for _ in range(AT_ONCE)
        ]
        await asyncio.to_thread(sys.stdin.read)  # until the test closes it
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps(dict(sorted(statuses.items()))))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
