"""The events of a stream on their way out of a replica: several in one message, when they come faster than it pays.

Each message costs replica, ingress and proxy together a millisecond or two of a CPU, whatever it holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar

Item = TypeVar("Item")

INTERVAL_S = 0.05
"""Seconds between two messages of one stream: what Ray Serve LLM takes, which sleeps for so long before the first."""


async def batched(items: AsyncGenerator[Item], interval_s: float = INTERVAL_S) -> AsyncGenerator[list[Item]]:
    """Items in lists. The first goes at once, and so does one that comes late; others wait for the interval's end.

    Nothing runs while there are none: with many streams, waking each to find nothing costs more than passing on.
    """
    waiting: list[Item] = []
    wake = asyncio.Event()
    may_send = True

    async def read() -> None:
        try:
            async for item in items:
                waiting.append(item)
                if may_send:
                    wake.set()
        finally:
            wake.set()

    def allow() -> None:
        nonlocal may_send
        may_send = True
        if waiting:
            wake.set()

    loop = asyncio.get_running_loop()
    reading = asyncio.create_task(read())
    pause: asyncio.TimerHandle | None = None
    try:
        while True:
            await wake.wait()
            wake.clear()
            is_over = reading.done()
            if waiting:
                batch, waiting, may_send = waiting, [], False
                pause = loop.call_later(interval_s, allow)
                yield batch
            if is_over:
                reading.result()
                return
    finally:
        if pause is not None:
            pause.cancel()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
