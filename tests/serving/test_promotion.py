"""A running endpoint changes its version in two phases: with several ingresses, clients that leave, and deaths."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import ServingError
from serving.registry import promotion as module
from serving.registry import state as state_module
from serving.registry.lease import LeaseTaken
from serving.registry.promotion import Promotions
from serving.registry.state import ChangeUnderWay, State
from serving.registry.versions import Registry
from serving.replica.versions import Versions
from tests.serving.tiny import adapter, whole


@dataclass
class Shelf:
    """A loader that notes what is asked of it, and cannot load some versions."""

    holds_many: bool
    fails: set[int]
    load_s: float = 0.0
    loaded: list[int] = field(default_factory=list)

    async def load(self, number: int) -> None:
        await asyncio.sleep(self.load_s)
        if number in self.fails:
            raise ServingError(f"version {number} cannot be loaded")
        self.loaded.append(number)

    async def unload(self, number: int) -> None:
        return None


class Fleet:
    """Replicas without a model in this process, as every ingress reaches them."""

    def __init__(self, registry: Registry, *, is_whole: bool, count: int = 2) -> None:
        self.is_whole = is_whole
        self.fails: set[int] = set()
        self.shelves = [Shelf(holds_many=not is_whole, fails=self.fails) for _ in range(count)]
        self.replicas = [Versions(registry, shelf) for shelf in self.shelves]
        for replica in self.replicas:
            replica.begin(registry.state(), registry.state().current)

    @property
    def answers(self) -> list[int]:
        """The version that each replica answers with."""
        return [replica.current for replica in self.replicas]

    async def prepare(self, number: int, *, canary: bool = False) -> None:
        for replica in self.replicas:
            await replica.prepare(number)

    async def roll(self, number: int) -> None:
        for replica in self.replicas:
            await replica.move(number)

    async def adopt(self) -> None:
        for replica in self.replicas:
            await replica.adopt()


@pytest.fixture(params=["adapters", "whole"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    """Versions 1 to 3, of which the first answers."""
    made = Registry(tmp_path / "registry")
    make: Callable[..., Path] = adapter if request.param == "adapters" else whole
    for number in (1, 2, 3):
        made.add(make(tmp_path / f"model-{number}", seed=number))
    made.promote(1)
    return made


def run(registry: Registry, scene: Callable[[Fleet, Callable[[], Promotions]], Coroutine[Any, Any, None]]) -> None:
    """Plays a scene with a fleet, and with a function that makes ingresses."""

    async def played() -> None:
        fleet = Fleet(registry, is_whole=registry.version(1).kind == "full")
        await scene(fleet, lambda: Promotions(Registry(registry.folder), fleet, check_lease=lambda: None))

    asyncio.run(played())


def test_a_version_is_promoted_and_taken_back(registry: Registry) -> None:
    async def scene(fleet: Fleet, ingress: Callable[[], Promotions]) -> None:
        promotions = ingress()
        assert await promotions.promote(2, started_by="Anna") == State(current=2, previous=1, serial=2)
        assert fleet.answers == [2, 2]
        assert await promotions.roll_back() == State(current=1, serial=3)
        assert fleet.answers == [1, 1]
        assert (await promotions.promote(3, 0.5)).canary == 3
        assert (await promotions.roll_back()).canary is None
        with pytest.raises(ServingError, match="nothing answered before version 1"):
            await promotions.roll_back()

    run(registry, scene)


def test_of_two_ingresses_that_promote_at_once_one_does_and_the_other_is_told_by_whom(registry: Registry) -> None:
    async def scene(fleet: Fleet, ingress: Callable[[], Promotions]) -> None:
        for shelf in fleet.shelves:
            shelf.load_s = 0.05
        first = asyncio.ensure_future(ingress().promote(2, started_by="Anna"))
        second = asyncio.ensure_future(ingress().promote(3, started_by="Ben"))
        results = await asyncio.gather(first, second, return_exceptions=True)
        refused = [result for result in results if isinstance(result, ChangeUnderWay)]
        (won,) = [result for result in results if isinstance(result, State)]
        assert len(refused) == 1
        assert f"version {won.current}, which {'Anna' if won.current == 2 else 'Ben'} asked for" in str(refused[0])
        assert registry.state() == won and fleet.answers == [won.current] * 2

    run(registry, scene)


def test_two_that_cannot_be_loaded_leave_the_registry_at_what_answers(registry: Registry) -> None:
    async def scene(fleet: Fleet, ingress: Callable[[], Promotions]) -> None:
        fleet.fails |= {2, 3}
        both = (ingress().promote(2), ingress().promote(3))
        results = await asyncio.gather(*both, return_exceptions=True)
        assert all(isinstance(result, ServingError) for result in results)
        assert registry.state() == State(current=1, serial=1) and fleet.answers == [1, 1]
        fleet.fails.clear()
        assert (await ingress().promote(3)).current == 3

    run(registry, scene)


def test_a_replica_that_cannot_load_it_takes_the_others_back(registry: Registry) -> None:
    async def scene(fleet: Fleet, ingress: Callable[[], Promotions]) -> None:
        fleet.shelves[1].fails = {2}
        with pytest.raises(ServingError, match="version 2 cannot be loaded"):
            await ingress().promote(2)
        assert registry.state() == State(current=1, serial=1)
        assert fleet.answers == [1, 1]

    run(registry, scene)


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.15])
def test_a_client_that_goes_away_leaves_everything_as_it_was(registry: Registry, after_s: float) -> None:
    async def scene(fleet: Fleet, ingress: Callable[[], Promotions]) -> None:
        for shelf in fleet.shelves:
            shelf.load_s = 0.3
        promotions = ingress()
        request = asyncio.ensure_future(promotions.promote(2))
        await asyncio.sleep(after_s)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        while promotions._runners:
            await asyncio.sleep(0.01)
        assert registry.state() == State(current=1, serial=1)
        assert fleet.answers == [1, 1]
        assert (await promotions.promote(3)).current == 3

    run(registry, scene)


def test_a_client_that_goes_away_once_it_is_true_changes_nothing(registry: Registry) -> None:
    async def scene(fleet: Fleet, ingress: Callable[[], Promotions]) -> None:
        promotions = ingress()
        adopt, reached = fleet.adopt, asyncio.Event()

        async def slow() -> None:
            reached.set()
            await asyncio.sleep(0.1)
            await adopt()

        fleet.adopt = slow  # type: ignore[method-assign]
        request = asyncio.ensure_future(promotions.promote(2))
        await reached.wait()
        request.cancel()
        while promotions._runners:
            await asyncio.sleep(0.01)
        assert registry.state().current == 2 and fleet.answers == [2, 2]

    run(registry, scene)


def test_an_ingress_that_dies_half_way_stops_nobody_for_long(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(fleet: Fleet, ingress: Callable[[], Promotions]) -> None:
        registry.begin_change(2, started_by="Anna")  # and no more: its process was killed
        if fleet.is_whole:
            await fleet.replicas[0].move(2)
        with pytest.raises(ChangeUnderWay, match="version 2, which Anna asked for"):
            await ingress().promote(3)
        monkeypatch.setattr(state_module, "HEARTBEAT_TIMEOUT_S", 0.0)  # time passes
        await fleet.adopt()  # as each replica does every two seconds
        assert fleet.answers == [1, 1], "what was under way counts for nothing any more"
        assert (await ingress().promote(3)).current == 3 and fleet.answers == [3, 3]

    run(registry, scene)


def test_what_takes_long_says_that_it_is_still_there(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)

    async def scene(fleet: Fleet, ingress: Callable[[], Promotions]) -> None:
        ready = asyncio.Event()
        prepare = fleet.prepare

        async def slow(number: int, *, canary: bool = False) -> None:
            await ready.wait()
            await prepare(number)

        fleet.prepare = slow  # type: ignore[method-assign]
        request = asyncio.ensure_future(ingress().promote(2))
        beats = set()
        while len(beats) < 4:
            await asyncio.sleep(0.01)
            pending = registry.state().pending
            beats |= {pending.heartbeat} if pending else set()
        ready.set()
        assert (await request).current == 2

    run(registry, scene)


def test_a_change_that_others_took_for_dead_ends_without_a_trace(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.05)

    async def scene(fleet: Fleet, ingress: Callable[[], Promotions]) -> None:
        for shelf in fleet.shelves:
            shelf.load_s = 0.5
        request = asyncio.ensure_future(ingress().promote(2))
        while registry.state().pending is None:
            await asyncio.sleep(0.01)
        pending = registry.state().pending
        assert pending is not None
        registry.abort_change(pending.token)
        other = registry.begin_change(3)
        with pytest.raises(ServingError, match="was silent"):
            await request
        assert registry.state().change() == other, "it is left to go on"

    run(registry, scene)


def test_an_endpoint_without_the_registry_s_lease_changes_nothing(registry: Registry) -> None:
    def refuse() -> None:
        raise LeaseTaken("it belongs to another")

    async def scene(fleet: Fleet, _: Callable[[], Promotions]) -> None:
        promotions = Promotions(registry, fleet, check_lease=refuse)
        changes = (promotions.promote(2), promotions.promote(2, 0.1), promotions.roll_back(), promotions.end_canary())
        for change in changes:
            with pytest.raises(LeaseTaken):
                await change
        assert registry.state() == State(current=1, serial=1)

    run(registry, scene)
