"""Whole weights are changed replica by replica, and tried on a replica of their own, in a real Ray Serve."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from alignment.errors import ServingError
from serving.registry.versions import Registry
from serving.replica.backend import Backend
from serving.replica.candidate import CANDIDATE_NAME
from serving.replica.routing import canary_answers
from tests.serving.fleet import WAIT_S, ask, backend_of, fleet, light_config
from tests.serving.tiny import whole


@pytest.fixture(scope="module")
def two(light_ray: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Two replicas of version 1, and versions to change to."""
    registry = versions(tmp_path_factory.mktemp("two"), 6)
    with fleet(registry, replicas=2):
        yield registry


def versions(folder: Path, count: int) -> Registry:
    registry = Registry(folder / "registry")
    for seed in range(count):
        registry.add(whole(folder / f"whole-{seed}", seed=seed))
    registry.promote(1)
    return registry


def played(
    registry: Registry,
    scene: Callable[[Backend], Coroutine[Any, Any, None]],
    replicas: int = 2,
    candidate_start_s: float = 60.0,
) -> None:
    """Plays a scene as an ingress."""

    async def play() -> None:
        backend = backend_of(registry, light_config(replicas, candidate_start_s=candidate_start_s))
        await backend.begin()
        await scene(backend)

    asyncio.run(play())


@contextmanager
def under_way(registry: Registry, number: int, share: float | None = None) -> Iterator[str]:
    """A change that has begun, by its token; given up at the end of the block, unless it was committed."""
    change = registry.begin_change(number, share)
    try:
        yield change.token
    finally:
        registry.abort_change(change.token)


async def until(condition: Callable[[], Coroutine[Any, Any, bool]], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.1)


async def held(backend: Backend) -> list[int]:
    """The versions of the replicas."""
    return sorted(status.version for status in await backend.statuses())


async def busy_until(backend: Backend, done: asyncio.Event) -> list[tuple[str, set[str], float]]:
    """Short requests of many conversations, one after the other."""
    answers = []
    while not done.is_set():
        answers.append(await ask(backend, f"conversation {len(answers)}", 0.1))
    return answers


def test_others_answer_while_one_replica_ends_its_answers_and_changes(two: Registry) -> None:
    async def scene(backend: Backend) -> None:
        done = asyncio.Event()
        long = asyncio.ensure_future(ask(backend, "long", 6.0))
        await asyncio.sleep(0.5)
        short = asyncio.ensure_future(busy_until(backend, done))
        with under_way(two, 2) as token:
            await backend.prepare(2)
            await backend.roll(2)
            two.commit_change(token)
        await backend.adopt()
        done.set()
        version, writers, seconds = await long
        assert (version, writers - {"begun"}) == ("1", {"1"}) and seconds > 6
        answers = await short
        assert all(writers - {"begun"} <= {version} for version, writers, _ in answers)
        assert {version for version, _, _ in answers} == {"1", "2"}
        slowest = max(seconds for _, _, seconds in answers)
        print(f"{len(answers)} short answers beside one of {seconds:.1f} s, the slowest in {slowest:.2f} s")
        assert slowest < 2.0, "nobody waits for the long answer"
        assert await held(backend) == [2, 2]

    played(two, scene)


@pytest.mark.parametrize("half", [False, True])
def test_when_the_second_replica_cannot_change_the_first_goes_back_and_the_service_answers(
    two: Registry, half: bool
) -> None:
    async def scene(backend: Backend) -> None:
        current, number = two.state().current, 4 if half else 3
        (two.folder / f"fails-{number}.json").write_text(json.dumps([2, half]))
        done = asyncio.Event()
        short = asyncio.ensure_future(busy_until(backend, done))
        with under_way(two, number):
            await backend.prepare(number)
            with pytest.raises(ServingError, match=rf"replica \w+ did not change to version {number}: .*not to be"):
                await backend.roll(number)
        await backend.roll(current)

        async def all_back() -> bool:
            return await held(backend) == [current, current]

        await until(all_back)
        done.set()
        assert {version for version, _, _ in await short} <= {str(current), str(number)}

    played(two, scene)


def test_a_replica_that_dies_in_the_middle_comes_back_with_what_answers_and_follows_in_the_end(two: Registry) -> None:
    async def scene(backend: Backend) -> None:
        current = two.state().current

        async def one_is_back() -> bool:
            return await held(backend) == [current, 5]

        async def all_have_changed() -> bool:
            return await held(backend) == [5, 5]

        with under_way(two, 5) as token:
            await backend.roll(5)
            with suppress(ServingError):
                await backend._call_replicas("die", (await backend.statuses())[0].replica, timeout_s=10)
            await until(one_is_back)
            assert (await ask(backend, "x", requested_version=current))[0] == str(current)
            two.commit_change(token)
        await backend.adopt()
        await until(all_have_changed)
        with under_way(two, current) as token:
            await backend.roll(current)
            two.commit_change(token)

    played(two, scene)


def test_a_replica_that_dies_while_it_changes_is_named_and_those_before_it_go_back(two: Registry) -> None:
    async def scene(backend: Backend) -> None:
        current = two.state().current
        with under_way(two, 5):
            first, second = await backend.statuses()
            await backend._move(first.replica, 5)
            long = asyncio.ensure_future(ask(backend, "long", 5.0, requested_version=current))
            await asyncio.sleep(0.3)
            rolling = asyncio.ensure_future(backend.roll(5))
            await asyncio.sleep(0.5)
            with suppress(ServingError):
                await backend._call_replicas("die", second.replica, timeout_s=1)
            with pytest.raises(ServingError, match=f"replica {second.replica} was lost while it changed to version 5"):
                await rolling
            with pytest.raises(AssertionError):
                await long
        await backend.roll(current)

        async def all_back() -> bool:
            return await held(backend) == [current, current]

        await until(all_back)

    played(two, scene)


def test_a_version_that_only_one_replica_holds_is_found_there(two: Registry) -> None:
    async def scene(backend: Backend) -> None:
        current = two.state().current
        first = (await backend.statuses())[0].replica
        with under_way(two, 5):
            await backend._move(first, 5)
            assert await held(backend) == sorted([current, 5])
            for place in range(6):
                assert (await ask(backend, f"{place}", requested_version=5))[0] == "5"
                assert (await ask(backend, f"{place}", requested_version=current))[0] == str(current)
        await backend.roll(current)
        refused = [part async for part in backend.ask("completions", {"model": "assistant", "prompt": "x"}, 5)]
        assert [getattr(part, "status", None) for part in refused] == [409]

    played(two, scene)


def test_a_canary_gets_a_replica_of_its_own_while_it_lasts_and_whole_conversations(two: Registry) -> None:
    async def scene(backend: Backend) -> None:
        current = two.state().current
        with under_way(two, 6, share=0.5) as token:
            await backend.prepare(6, canary=True)
            two.commit_change(token)
        await backend.adopt()
        other = backend_of(two, light_config(2))
        await other.begin()

        async def other_knows() -> bool:
            assert other._candidate is not None
            return other._candidate.holds(6)

        await until(other_knows)
        for place in range(24):
            text = f"conversation {place}"
            expected = "6" if canary_answers(text, 6, 0.5) else str(current)
            assert {(await ask(ingress, text))[0] for ingress in (backend, other, backend)} == {expected}
        assert (await ask(backend, "gate", requested_version=6))[0] == "6"
        assert await held(backend) == [current, current]
        two.end_canary()
        assert (await ask(backend, "conversation 0"))[0] in {str(current), "6"}  # it may not know so far
        await backend.adopt()
        assert {(await ask(backend, f"conversation {place}"))[0] for place in range(24)} == {str(current)}

        async def is_gone() -> bool:
            replicas = serve.status().applications["light"].deployments[CANDIDATE_NAME].replica_states
            return not sum(replicas.values())

        await until(is_gone)

    played(two, scene)


@pytest.mark.alone
@pytest.mark.slow  # processes that Ray Serve starts and ends in its own time
def test_a_candidate_that_cannot_start_is_told_with_its_reason_and_the_next_one_can(two: Registry) -> None:
    async def scene(backend: Backend) -> None:
        order = two.folder / "no-candidate"
        order.touch()
        with (
            under_way(two, 6, share=0.5),
            pytest.raises(ServingError, match="cannot be loaded beside the others: there is no memory for it"),
        ):
            await backend.prepare(6, canary=True)
        order.unlink()
        await backend.adopt()
        with under_way(two, 5, share=0.5):
            await backend.prepare(5, canary=True)
        await backend.adopt()
        assert (await ask(backend, "anything"))[0] == str(two.state().current)

    played(two, scene)


@pytest.mark.alone
@pytest.mark.slow  # processes that Ray Serve starts and ends in its own time
def test_one_replica_makes_nobody_wait_long_and_with_a_canary_nobody_at_all(light_ray: int, tmp_path: Path) -> None:
    registry = versions(tmp_path, 2)

    async def scene(backend: Backend) -> None:
        long = asyncio.ensure_future(ask(backend, "long", 5.0))
        await asyncio.sleep(0.3)
        with under_way(registry, 2):
            rolling = asyncio.ensure_future(backend.roll(2))
            await asyncio.sleep(0.5)
            version, _, seconds = await ask(backend, "short")
            assert version == "1" and seconds < WAIT_S + 1
            with pytest.raises(ServingError, match="while others waited that no other replica could take"):
                await rolling
        assert (await long)[0] == "1"
        with under_way(registry, 2, share=0.0) as token:
            await backend.prepare(2, canary=True)
            registry.commit_change(token)
        await backend.adopt()
        long = asyncio.ensure_future(ask(backend, "long", 4.0))
        await asyncio.sleep(0.3)
        with under_way(registry, 2) as token:
            rolling = asyncio.ensure_future(backend.roll(2))
            await asyncio.sleep(0.5)
            version, _, seconds = await ask(backend, "short")
            assert version == "2" and seconds < 1 and not rolling.done()
            await rolling
            registry.commit_change(token)
        assert (await long)[0] == "1"
        await backend.adopt()
        assert (await ask(backend, "short"))[0] == "2"

    with suppress(KeyError):
        serve.delete("light")
    with fleet(registry, replicas=1):
        played(registry, scene, replicas=1)


@pytest.mark.alone
@pytest.mark.slow  # as above
def test_a_service_that_sleeps_can_be_promoted_and_wakes_with_the_new_version(light_ray: int, tmp_path: Path) -> None:
    registry = versions(tmp_path, 2)

    async def scene(backend: Backend) -> None:
        with under_way(registry, 2) as token:
            await backend.prepare(2)
            await backend.roll(2)
            registry.commit_change(token)
        await backend.adopt()
        assert (await ask(backend, "good morning"))[0] == "2"

    with suppress(KeyError):
        serve.delete("light")
    with fleet(registry, replicas=0):
        played(registry, scene, replicas=0)


@pytest.mark.alone
@pytest.mark.slow  # Ray Serve may take 40 s to say that something finds no place
def test_where_there_is_no_room_for_a_candidate_it_is_said_in_time_and_why(light_ray: int, tmp_path: Path) -> None:
    registry = versions(tmp_path, 2)

    async def scene(backend: Backend) -> None:
        reason = r"no further replica has started within 75 s to hold version 2 .* \{\"CPU\": 100"
        with under_way(registry, 2, share=0.5), pytest.raises(ServingError, match=reason):
            await backend.prepare(2, canary=True)
        await backend.adopt()
        assert (await ask(backend, "anything"))[0] == "1"

    with suppress(KeyError):
        serve.delete("light")
    with fleet(registry, replicas=1, candidate_cpus=100):
        played(registry, scene, replicas=1, candidate_start_s=75)
