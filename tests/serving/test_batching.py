"""Events of a stream leave a replica at once when they are rare, and together when they are not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from serving.replica.batching import batch_items


async def _collected(items: AsyncGenerator[int], interval_s: float) -> list[list[int]]:
    return [batch async for batch in batch_items(items, interval_s)]


def test_the_first_item_goes_at_once_and_those_that_come_meanwhile_together() -> None:
    async def items() -> AsyncGenerator[int]:
        for number in range(5):
            yield number
            await asyncio.sleep(0)

    assert asyncio.run(_collected(items(), 60)) == [[0], [1, 2, 3, 4]]


def test_an_item_that_comes_late_waits_for_nothing() -> None:
    async def scene() -> None:
        more = asyncio.Event()

        async def items() -> AsyncGenerator[int]:
            yield 1
            await more.wait()
            yield 2
            await asyncio.Event().wait()

        batches = batch_items(items(), 0.01)
        assert await anext(batches) == [1]
        await asyncio.sleep(0.05)  # the interval is over, and nothing was there
        arrival = asyncio.ensure_future(anext(batches))
        more.set()
        for _ in range(5):  # turns of the loop, and no time
            await asyncio.sleep(0)
        assert arrival.done() and arrival.result() == [2]
        await batches.aclose()

    asyncio.run(scene())


def test_what_is_waiting_goes_when_the_interval_is_over() -> None:
    async def scene() -> None:
        async def items() -> AsyncGenerator[int]:
            yield 1
            await asyncio.sleep(0)
            yield 2
            await asyncio.sleep(0)
            yield 3
            await asyncio.Event().wait()

        batches = batch_items(items(), 0.02)
        assert [await anext(batches), await anext(batches)] == [[1], [2, 3]]
        await batches.aclose()

    asyncio.run(scene())


def test_items_before_a_failure_arrive_and_then_the_failure() -> None:
    async def items() -> AsyncGenerator[int]:
        yield 1
        raise ValueError("gone")

    async def scene() -> None:
        batches = batch_items(items(), 60)
        assert await anext(batches) == [1]
        with pytest.raises(ValueError, match="gone"):
            await anext(batches)

    asyncio.run(scene())


def test_who_stops_reading_ends_what_is_read() -> None:
    async def scene() -> None:
        ended = asyncio.Event()

        async def items() -> AsyncGenerator[int]:
            try:
                yield 1
                await asyncio.Event().wait()
            finally:
                ended.set()

        batches = batch_items(items(), 60)
        await anext(batches)
        await batches.aclose()
        assert ended.is_set()

    asyncio.run(scene())
