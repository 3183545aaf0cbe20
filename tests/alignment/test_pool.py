"""The pool over engine handles that a test can disturb: others go on without a lost engine; versions never mix."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignment.errors import EngineLost, ModelError, RolloutError
from alignment.rollout import Prompt, Rollout, Sampling, Weights
from alignment.rollout.pool import EnginePool, longest_wait_s
from alignment.rollout.transfer import WeightUpdate
from alignment.rollout.transfer.files import FileWeightTransfer
from tests.rollouts import submit

TIMEOUT_S = 2.0
PROMPTS = [Prompt(tokens=(1, 2, 3), seed=seed) for seed in range(8)]
SAMPLING = Sampling(num_completions=1, max_tokens=4, max_length=16, temperature=1.0)


@dataclass
class Numbers:
    """The Weights port over one number."""

    version: int

    def save_adapter(self, folder: Path) -> bool:
        return False

    def participate(self) -> None: ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "number", torch.tensor([float(self.version)])


@dataclass
class PaperEngineHandle:
    """The place of an engine whose completions are the number in the files that it has read.

    A test sets flags of threads, which the pool's own thread reads: every wait is a poll.
    """

    room: threading.Event = field(default_factory=threading.Event)
    """Whether a restart finds a place."""
    pace: threading.Event = field(default_factory=threading.Event)
    """Whether loads go on; one that waits for it stands in the middle of the files."""
    is_alive: bool = True
    is_damaged: bool = False
    """Whether loads fail."""
    version: int | None = None
    number: int | None = None
    restarts: int = 0
    is_loading: bool = False

    def __post_init__(self) -> None:
        self.room.set()
        self.pace.set()

    async def begin(self) -> None:
        await self.check()

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        await asyncio.sleep(0.01)
        await self.check()
        if self.version is None:
            raise RolloutError("stale")
        assert self.number is not None
        return [Rollout(tokens=(self.number,), logprobs=(0.0,), truncated=False, weight_version=self.version)]

    async def load(self, update: WeightUpdate) -> None:
        from safetensors.torch import load_file

        await self.check()
        self.version, self.is_loading = None, True
        try:
            while not self.pace.is_set():
                await asyncio.sleep(0.005)
                await self.check()
            if self.is_damaged:
                raise RolloutError("the files are damaged")
            (file,) = update.update_info["files"]
            self.number = int(load_file(file)["number"])
            await self.check()
            self.version = update.version
        finally:
            self.is_loading = False

    async def check(self) -> None:
        if not self.is_alive:
            raise EngineLost("this engine has died")

    async def restart(self) -> None:
        self.restarts += 1
        while not self.room.is_set():
            await asyncio.sleep(0.005)
        self.is_alive, self.version = True, None

    async def stop(self) -> None:
        self.is_alive = False

    def die(self, *, room: bool) -> None:
        """Ends the engine; its successor finds a place if there is `room`."""
        self.room.set() if room else self.room.clear()
        self.is_alive, self.version = False, None


@dataclass
class WatchfulTransfer(FileWeightTransfer):
    """Writes down whether an engine was reading when its files were replaced."""

    def __init__(self, folder: Path, handles: list[PaperEngineHandle]) -> None:
        super().__init__("paper", (folder,))
        self.handles = handles
        self.torn = 0

    def send(self, weights: Weights, *, adapter: bool) -> WeightUpdate:
        self.torn += sum(handle.is_loading for handle in self.handles)
        return super().send(weights, adapter=adapter)


class Run:
    """A pool with two engines, and what a training worker does with them."""

    def __init__(self, folder: Path) -> None:
        self.handles = [PaperEngineHandle(), PaperEngineHandle()]
        self.transfer = WatchfulTransfer(folder, self.handles)
        self.pool = EnginePool(self.handles, self.transfer, adapter=False, timeout_s=TIMEOUT_S)
        self.version = 0

    def sync(self) -> None:
        self.version += 1
        self.pool.load(Numbers(self.version))

    def draw(self) -> None:
        """Draws, and checks that everything is of the newest version."""
        drawn = submit(self.pool, PROMPTS, SAMPLING)()
        assert [(rollout.tokens, rollout.weight_version) for (rollout,) in drawn] == [
            ((self.version,), self.version)
        ] * 8


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    started = Run(tmp_path)
    yield started
    for handle in started.handles:
        handle.room.set()
        handle.pace.set()
    started.pool.close()
    assert started.transfer.torn == 0, "files were replaced while an engine read them"


@pytest.fixture
def started(run: Run) -> Run:
    run.pool.begin()
    run.sync()
    run.draw()
    return run


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def test_a_restart_that_finds_no_place_stops_nobody_and_says_so(started: Run, caplog: pytest.LogCaptureFixture) -> None:
    lost, other = started.handles
    lost.die(room=False)
    with within(TIMEOUT_S):
        for _ in range(3):
            started.draw()
            started.sync()
    assert any("1 of 2 are there: this engine has died" in record.message for record in caplog.records)
    assert lost.version is None and lost.restarts == 1
    lost.room.set()
    wait_until(lambda: "an engine is back; 2 of 2 are there" in caplog.text)
    assert lost.version == other.version == started.version, "it joins with the weights of now"
    started.draw()


def test_an_engine_that_is_back_takes_the_next_update_with_the_others(started: Run) -> None:
    lost, other = started.handles
    lost.die(room=False)
    started.draw()
    lost.room.set()
    wait_until(lambda: lost.version == started.version)
    started.sync()
    assert lost.version == other.version == started.version
    started.draw()


def test_the_other_engine_goes_on_when_one_dies_in_the_middle_of_a_load(started: Run) -> None:
    dying, other = started.handles
    dying.pace.clear()
    sync = threading.Thread(target=started.sync)
    sync.start()
    wait_until(lambda: dying.is_loading)
    dying.die(room=False)
    sync.join(timeout=TIMEOUT_S)
    assert not sync.is_alive()
    assert other.version == started.version
    started.draw()
    dying.room.set()
    dying.pace.set()
    wait_until(lambda: dying.version == started.version)
    started.draw()


def test_an_engine_that_stands_still_in_a_load_is_replaced_when_its_time_is_up(started: Run) -> None:
    stuck, other = started.handles
    stuck.pace.clear()
    with within(TIMEOUT_S):
        started.sync()
    assert stuck.restarts == 1
    assert other.version == started.version
    started.draw()


def test_files_stay_while_a_returning_engine_reads_them(started: Run) -> None:
    lost, _ = started.handles
    lost.pace.clear()
    lost.die(room=True)
    started.draw()
    wait_until(lambda: lost.is_loading)
    sync = threading.Thread(target=started.sync)
    sync.start()
    time.sleep(0.1)
    assert sync.is_alive(), "the sync waits"
    lost.pace.set()
    sync.join(timeout=TIMEOUT_S)
    assert [handle.version for handle in started.handles] == [started.version] * 2
    started.draw()


def test_a_returning_engine_that_is_lost_again_stops_nobody(started: Run) -> None:
    lost, other = started.handles
    lost.pace.clear()
    lost.die(room=True)
    started.draw()
    wait_until(lambda: lost.is_loading)
    sync = threading.Thread(target=started.sync)
    sync.start()
    time.sleep(0.1)
    lost.die(room=False)
    sync.join(timeout=TIMEOUT_S / 2)
    assert not sync.is_alive()
    assert other.version == started.version
    started.draw()


def test_a_failed_load_is_tried_again_at_the_next_sync(started: Run, caplog: pytest.LogCaptureFixture) -> None:
    damaged, other = started.handles
    damaged.is_damaged = True
    started.sync()
    wait_until(lambda: "an engine could not be restarted, the next sync tries again; 1 of 2" in caplog.text)
    started.draw()
    damaged.is_damaged = False
    started.sync()
    wait_until(lambda: damaged.version == started.version)
    assert other.restarts == 0
    started.draw()


def test_with_one_engine_a_sync_waits_for_its_restart(started: Run) -> None:
    first, second = started.handles
    second.die(room=False)
    first.die(room=True)
    started.draw()
    started.sync()
    assert first.version == started.version
    started.draw()


def test_without_any_engine_a_sync_fails_in_bounded_time(started: Run) -> None:
    for handle in started.handles:
        handle.die(room=False)
    with within(longest_wait_s(TIMEOUT_S)), pytest.raises(RolloutError, match=r"within 2 s .*0 of 2 are there"):
        started.sync()
    with pytest.raises(RolloutError, match="no weights"):
        started.draw()


def test_without_any_engine_prompts_fail_in_bounded_time(started: Run) -> None:
    for handle in started.handles:
        handle.die(room=False)
    with within(longest_wait_s(TIMEOUT_S)), pytest.raises(RolloutError, match=r"within 2 s .*0 of 2 are there"):
        started.draw()


def test_an_update_that_no_engine_can_load_is_an_error_with_its_text(started: Run) -> None:
    for handle in started.handles:
        handle.is_damaged = True
    with pytest.raises(RolloutError, match="no engine could be restarted: the files are damaged"):
        started.sync()


def test_a_worker_attaches_to_the_engines_that_are_left(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    lost, _ = run.handles
    lost.die(room=False)
    with within(TIMEOUT_S):
        run.pool.begin()
        run.sync()
        run.draw()
    assert "1 of 2 are there" in caplog.text


def test_an_engine_that_cannot_start_says_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def begin() -> None:
        raise ModelError("there is no config.json")

    monkeypatch.setattr(run.handles[1], "begin", begin)
    with pytest.raises(ModelError, match=r"no config\.json"):
        run.pool.begin()


def test_a_pool_that_closes_waits_for_no_restart(started: Run) -> None:
    started.handles[0].die(room=False)
    started.draw()
    with within(1):
        started.pool.close()


def test_a_sync_fails_before_other_workers_lose_their_patience() -> None:
    """They wait for this one in a collective, with the process group's time limit."""
    rollouts, readers, load, writing = 1, 0.5, 1, 1
    assert longest_wait_s(900) > (rollouts + readers + load + writing) * 900
