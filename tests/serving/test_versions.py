"""Which version answers while a replica moves from one to another, with a loader that loads nothing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from alignment.errors import ServingError
from serving.registry import State
from serving.versions import HalfLoaded, Versions


@dataclass
class Books:
    """A registry's state, in memory."""

    now: State

    def state(self) -> State:
        return self.now


@dataclass
class Shelf:
    """A loader that notes what is asked of it."""

    beside: bool
    present: set[int] = field(default_factory=set)
    fails: type[ServingError] | None = None
    in_progress: int = 0

    async def load(self, number: int) -> None:
        await asyncio.sleep(0.01)
        if self.fails:
            raise self.fails("broken")
        if not self.beside:
            assert self.in_progress == 0, "whole weights changed under a request"
            self.present.clear()
        self.present.add(number)

    async def unload(self, number: int) -> None:
        self.present.remove(number)


def replica(*, beside: bool, **state: Any) -> tuple[Versions, Books, Shelf]:
    books, shelf = Books(State(current=1, serial=1, **state)), Shelf(beside=beside, present={1})
    versions = Versions(books, shelf)  # type: ignore[arg-type]
    versions.begin(books.now)
    return versions, books, shelf


def move(books: Books, **to: Any) -> None:
    books.now = replace(books.now, serial=books.now.serial + 1, **to)


async def answer(versions: Versions, shelf: Shelf, seconds: float, wanted: int | None = None) -> tuple[int, int]:
    """The version at the beginning and at the end of a request."""
    async with versions.hold(wanted) as number:
        shelf.in_progress += 1
        await asyncio.sleep(seconds)
        assert number in shelf.present
        shelf.in_progress -= 1
        return number, number


@pytest.mark.parametrize("beside", [True, False])
def test_requests_in_progress_end_with_the_version_they_began_with(beside: bool) -> None:
    async def scene() -> None:
        versions, books, shelf = replica(beside=beside)
        early = [asyncio.ensure_future(answer(versions, shelf, 0.05)) for _ in range(5)]
        await asyncio.sleep(0.01)
        move(books, current=2, previous=1)
        moving = asyncio.ensure_future(versions.adopt())
        await asyncio.sleep(0.001)
        late = [asyncio.ensure_future(answer(versions, shelf, 0.0)) for _ in range(5)]
        assert await moving == 2
        assert {number for number, _ in await asyncio.gather(*early)} == {1}
        assert {number for number, _ in await asyncio.gather(*late)} <= ({1, 2} if beside else {2})
        assert (await answer(versions, shelf, 0.0))[0] == 2

    asyncio.run(scene())


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_answering() -> None:
    async def scene() -> None:
        versions, books, shelf = replica(beside=True)
        shelf.fails = ServingError
        move(books, current=2, previous=1)
        with pytest.raises(ServingError):
            await versions.adopt()
        assert (await answer(versions, shelf, 0.0))[0] == 1
        assert not versions.broken

    asyncio.run(scene())


def test_weights_that_got_stuck_half_way_answer_nothing_any_more() -> None:
    async def scene() -> None:
        versions, books, shelf = replica(beside=False)
        shelf.fails = HalfLoaded
        move(books, current=2, previous=1)
        with pytest.raises(HalfLoaded):
            await versions.adopt()
        assert versions.broken
        with pytest.raises(HalfLoaded):
            await answer(versions, shelf, 0.0)

    asyncio.run(scene())


def test_the_canary_gets_its_share_and_can_be_asked_for() -> None:
    async def scene() -> None:
        versions, books, shelf = replica(beside=True)
        move(books, canary=2, share=0.3)
        await versions.adopt()
        drawn = [(await answer(versions, shelf, 0.0))[0] for _ in range(1000)]
        assert 0.2 < drawn.count(2) / 1000 < 0.4
        assert (await answer(versions, shelf, 0.0, wanted=2))[0] == 2
        move(books, share=0.0)
        await versions.adopt()
        assert {(await answer(versions, shelf, 0.0))[0] for _ in range(50)} == {1}
        with pytest.raises(ServingError, match="Version 9 is not loaded"):
            await answer(versions, shelf, 0.0, wanted=9)

    asyncio.run(scene())


def test_what_nobody_needs_is_let_go_but_never_while_a_request_uses_it() -> None:
    async def scene() -> None:
        versions, books, shelf = replica(beside=True)
        slow = asyncio.ensure_future(answer(versions, shelf, 0.1))
        await asyncio.sleep(0.01)
        for current in (2, 3, 4):
            move(books, current=current, previous=current - 1)
            await versions.adopt()
        assert shelf.present == {1, 3, 4}  # 1 is in use, 3 is for a rollback
        await slow
        move(books, current=5, previous=4)
        await versions.adopt()
        assert shelf.present == {4, 5}

    asyncio.run(scene())
