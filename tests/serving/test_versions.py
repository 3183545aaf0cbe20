"""Which version answers while a replica moves from one to another, with a loader that loads nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import CheckpointError, ServingError
from serving.registry.state import HEARTBEAT_TIMEOUT_S, PendingChange, State
from serving.replica.versions import MoveLimits, PartialLoadError, ReplicaUnavailable, Versions, candidate_version


@dataclass
class Books:
    """A registry's state, in memory."""

    now: State
    damaged: set[int] = field(default_factory=set)
    verified: list[int] = field(default_factory=list)
    verify_s: float = 0.0

    def state(self) -> State:
        return self.now

    def verify(self, number: int) -> None:
        assert threading.current_thread() is not threading.main_thread(), "requests would wait for the hashes"
        time.sleep(self.verify_s)
        self.verified.append(number)
        if number in self.damaged:
            raise CheckpointError(f"version {number} is damaged")


@dataclass
class Shelf:
    """A loader that notes what is asked of it."""

    holds_many: bool
    present: set[int] = field(default_factory=set)
    fails: type[ServingError] | None = None
    in_progress: int = 0
    load_s: float = 0.01
    loading: list[str] = field(default_factory=list)
    """Shared by the replicas of a test: who loads just now."""

    async def load(self, number: int) -> None:
        self.loading.append("replica")
        assert len(self.loading) == 1, "two replicas changed at once"
        await asyncio.sleep(self.load_s)
        self.loading.pop()
        if self.fails:
            raise self.fails("broken")
        if not self.holds_many:
            assert self.in_progress == 0, "whole weights changed under a request"
            self.present.clear()
        self.present.add(number)

    async def unload(self, number: int) -> None:
        self.present.remove(number)


def replica(*, holds_many: bool, limits: MoveLimits | None = None, **state: Any) -> tuple[Versions, Books, Shelf]:
    books, shelf = Books(State(current=1, serial=1, **state)), Shelf(holds_many=holds_many, present={1})
    versions = Versions(books, shelf, limits=limits)  # type: ignore[arg-type]
    versions.begin(books.now, 1)
    return versions, books, shelf


def move(books: Books, **to: Any) -> None:
    books.now = replace(books.now, serial=books.now.serial + 1, **to)


async def answer(versions: Versions, shelf: Shelf, seconds: float, model_version: int | None = None) -> tuple[int, int]:
    """The version at the beginning and at the end of a request, which no other replica can take."""
    async with versions.hold(model_version, may_leave=False) as number:
        shelf.in_progress += 1
        await asyncio.sleep(seconds)
        assert number in shelf.present
        shelf.in_progress -= 1
        return number, number


@pytest.mark.parametrize("holds_many", [True, False])
def test_requests_in_progress_end_with_the_version_they_began_with(holds_many: bool) -> None:
    async def scene() -> None:
        versions, books, shelf = replica(holds_many=holds_many)
        early = [asyncio.ensure_future(answer(versions, shelf, 0.05)) for _ in range(5)]
        await asyncio.sleep(0.01)
        move(books, current=2, previous=1)
        moving = asyncio.ensure_future(versions.adopt())
        await asyncio.sleep(0.001)
        late = [asyncio.ensure_future(answer(versions, shelf, 0.0)) for _ in range(5)]
        assert await moving == 2
        assert {number for number, _ in await asyncio.gather(*early)} == {1}
        assert {number for number, _ in await asyncio.gather(*late)} <= {1, 2}
        assert (await answer(versions, shelf, 0.0))[0] == 2

    asyncio.run(scene())


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_answering() -> None:
    async def scene() -> None:
        versions, books, shelf = replica(holds_many=True)
        shelf.fails = ServingError
        move(books, current=2, previous=1)
        with pytest.raises(ServingError):
            await versions.adopt()
        assert (await answer(versions, shelf, 0.0))[0] == 1
        assert not versions.is_broken

    asyncio.run(scene())


def test_weights_that_got_stuck_half_way_answer_nothing_any_more() -> None:
    async def scene() -> None:
        versions, books, shelf = replica(holds_many=False)
        shelf.fails = PartialLoadError
        move(books, current=2, previous=1)
        with pytest.raises(PartialLoadError):
            await versions.adopt()
        assert versions.is_broken
        with pytest.raises(ReplicaUnavailable) as turned_away:
            await answer(versions, shelf, 0.0)
        assert turned_away.value.is_broken

    asyncio.run(scene())


def test_a_canary_answers_whoever_asks_for_it_and_nobody_else() -> None:
    async def scene() -> None:
        versions, books, shelf = replica(holds_many=True)
        move(books, canary=2, share=0.9)
        await versions.adopt()
        assert {(await answer(versions, shelf, 0.0))[0] for _ in range(20)} == {1}
        assert (await answer(versions, shelf, 0.0, model_version=2))[0] == 2
        with pytest.raises(ServingError, match="Version 9 is not loaded"):
            await answer(versions, shelf, 0.0, model_version=9)
        with pytest.raises(ReplicaUnavailable):
            async with versions.hold(9):
                pass

    asyncio.run(scene())


def test_what_nobody_needs_is_let_go_but_never_while_a_request_uses_it() -> None:
    async def scene() -> None:
        versions, books, shelf = replica(holds_many=True)
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


def test_a_replica_that_ends_its_answers_sends_new_requests_elsewhere_and_keeps_those_that_nobody_else_can_take() -> (
    None
):
    async def scene() -> None:
        versions, _, shelf = replica(holds_many=False)
        early = asyncio.ensure_future(answer(versions, shelf, 0.3))
        await asyncio.sleep(0.01)
        moving = asyncio.ensure_future(versions.move(2))
        await asyncio.sleep(0.1)
        with pytest.raises(ReplicaUnavailable) as turned_away:
            async with versions.hold(None):
                pass
        assert turned_away.value.moves_to == 2
        late = asyncio.ensure_future(answer(versions, shelf, 0.0))
        assert await early == (1, 1)
        await moving
        assert await late == (2, 2)
        async with versions.hold(None) as number:
            assert number == 2

    asyncio.run(scene())


def test_the_files_are_verified_while_requests_are_still_taken_and_once() -> None:
    async def scene() -> None:
        versions, books, shelf = replica(holds_many=False)
        books.verify_s = 0.2
        await versions.prepare(2)
        moving = asyncio.ensure_future(versions.move(2))
        await moving
        assert books.verified == [2]
        moving = asyncio.ensure_future(versions.move(3))
        await asyncio.sleep(0.1)
        assert await answer(versions, shelf, 0.0) == (2, 2)
        assert not moving.done()
        await moving
        assert books.verified == [2, 3]

    asyncio.run(scene())


def test_a_damaged_version_changes_nothing_and_is_named() -> None:
    async def scene() -> None:
        versions, books, shelf = replica(holds_many=False)
        books.damaged = {2}
        with pytest.raises(CheckpointError, match="version 2 is damaged"):
            await versions.move(2)
        assert await answer(versions, shelf, 0.0) == (1, 1)
        assert versions.failure is not None and versions.failure.number == 2
        await versions.move(3)
        assert versions.failure is None

    asyncio.run(scene())


def test_nobody_waits_longer_for_a_long_answer_than_the_limit_says_and_then_nothing_has_changed() -> None:
    async def scene() -> None:
        versions, _, shelf = replica(holds_many=False, limits=MoveLimits(wait_s=0.2))
        long = asyncio.ensure_future(answer(versions, shelf, 1.5))
        await asyncio.sleep(0.01)
        moving = asyncio.ensure_future(versions.move(2))
        await asyncio.sleep(0.5)
        assert not moving.done(), "nobody waits yet"
        short = asyncio.ensure_future(answer(versions, shelf, 0.0))
        with pytest.raises(ServingError, match=r"1 answers in progress did not end within 0\.2 s, while others waited"):
            await moving
        assert not long.done()
        assert await short == (1, 1)
        assert await long == (1, 1)
        assert versions.loaded_numbers == (1,)

    asyncio.run(scene())


def test_answers_that_do_not_end_are_waited_for_no_longer_than_the_limit_says() -> None:
    async def scene() -> None:
        versions, _, shelf = replica(holds_many=False, limits=MoveLimits(drain_s=0.2))
        long = asyncio.ensure_future(answer(versions, shelf, 1.0))
        await asyncio.sleep(0.01)
        with pytest.raises(ServingError, match=r"did not end within 0\.2 s; nothing has changed"):
            await versions.move(2)
        assert await long == (1, 1)

    asyncio.run(scene())


def test_replicas_that_follow_the_registry_change_one_after_the_other(tmp_path: Path) -> None:
    async def scene() -> None:
        books, loading = Books(State(current=1, serial=1)), list[str]()
        replicas = [
            Versions(
                books, Shelf(holds_many=False, present={1}, loading=loading, load_s=0.2), lock_file=tmp_path / "turn"
            )  # type: ignore[arg-type]
            for _ in range(3)
        ]
        for versions in replicas:
            versions.begin(books.now, 1)
        move(books, current=2, previous=1)
        assert await asyncio.gather(*(versions.adopt() for versions in replicas)) == [2, 2, 2]

    asyncio.run(scene())


def test_a_replica_keeps_what_a_promotion_under_way_brought_and_goes_back_when_that_falls_silent() -> None:
    async def scene() -> None:
        versions, books, shelf = replica(holds_many=False)
        move(books, pending=PendingChange(number=2, heartbeat=time.time()))
        await versions.adopt()
        assert versions.loaded_numbers == (1,), "its turn has not come"
        await versions.move(2)
        await versions.adopt()
        assert versions.loaded_numbers == (2,)
        move(books, pending=PendingChange(number=2, heartbeat=time.time() - HEARTBEAT_TIMEOUT_S))
        await versions.adopt()
        assert versions.loaded_numbers == (1,)
        await versions.move(2)
        move(books, current=2, previous=1, pending=None)
        await versions.adopt()
        assert await answer(versions, shelf, 0.0) == (2, 2)

    asyncio.run(scene())


def test_an_adapter_that_was_made_ready_stays_while_its_promotion_is_under_way() -> None:
    async def scene() -> None:
        versions, books, _ = replica(holds_many=True)
        await versions.prepare(2)
        move(books, pending=PendingChange(number=2, heartbeat=time.time()))
        await versions.adopt()
        assert versions.loaded_numbers == (1, 2)
        move(books, pending=None)
        await versions.adopt()
        assert versions.loaded_numbers == (1,)

    asyncio.run(scene())


def test_the_candidate_holds_the_canary_or_what_is_to_become_one() -> None:
    fresh = time.time()
    assert candidate_version(State(current=1)) is None
    assert candidate_version(State(current=1, canary=2)) == 2
    assert candidate_version(State(current=1, pending=PendingChange(number=3, share=0.0, heartbeat=fresh))) == 3
    assert candidate_version(State(current=1, pending=PendingChange(number=3, heartbeat=fresh))) is None
    assert candidate_version(State(current=1, pending=PendingChange(number=3, share=0.5, heartbeat=0.0))) is None
