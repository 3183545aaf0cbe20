"""A sync that fails on the main worker, at ZeRO stage 3 with two real workers: all are told why, at once, in step."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from alignment.distributed.backends import wrap
from alignment.distributed.world import World, run_on_all
from alignment.errors import RolloutError
from alignment.models.roles import ActorWeights
from alignment.rollout import Weights
from alignment.rollout.pool import EnginePool
from alignment.rollout.transfer import WeightUpdate
from alignment.rollout.transfer.files import FileWeightTransfer
from alignment.settings.run import ZeroConfig
from tests.alignment.test_pool import PaperEngineHandle
from tests.alignment.test_zero import Task, Workers

SECONDS = 30.0
"""Within which a failure has to be told to everybody; a worker that waits for it in vain waits half an hour."""


class UnreadyEngineHandle(PaperEngineHandle):
    """Takes no update."""

    async def load(self, update: WeightUpdate) -> None:
        raise RolloutError("the engine has lost its files")


class BrokenTransfer(FileWeightTransfer):
    """Fails before it looks at the weights."""

    def send(self, weights: Weights, *, adapter: bool) -> WeightUpdate:
        raise RolloutError("there is no transfer")


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file can become larger, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def sync(world: World, task: Task, failure: str, folder: str) -> list[tuple[str, float, float]]:
    """Every worker's error, its seconds, and the sum of what all have afterwards: collectives go on."""
    model = task.load()
    trained = wrap(model.module, task.optim, world, root=model.root)
    weights = ActorWeights(actor=model, backend=trained, version=1)
    handles: list[PaperEngineHandle] = []
    if world.is_main:
        handles = [UnreadyEngineHandle() if failure == "after the gather" else PaperEngineHandle()]
    place = Path(folder) / "file" if failure == "no folder" else Path(folder)
    transfer = (BrokenTransfer if failure == "before the gather" else FileWeightTransfer)("run", (place,))
    pool = EnginePool(handles, transfer, adapter=task.lora, timeout_s=60, is_main=world.is_main)
    world.wait()
    started, text = time.perf_counter(), ""
    with small_disk(1000) if failure == "full disk" and world.is_main else contextlib.nullcontext():
        try:
            run_on_all(lambda: pool.load(weights), world)
        except RolloutError as error:
            text = str(error)
    seconds = time.perf_counter() - started
    pool.close()
    total = float(world.sum(torch.tensor(float(world.rank + 1))))
    assert all(weight.isfinite().all() for _, weight in trained.named_weights())
    return world.gather((text, seconds, total))


FAILURES = {
    "before the gather": "there is no transfer",
    "no folder": "cannot be written: .*Not a directory",
    "full disk": "cannot be written: .*File too large",
    "after the gather": "the engine has lost its files",
}


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapter"])
@pytest.mark.parametrize("failure", FAILURES)
def test_every_worker_is_told_at_once_what_failed_on_the_main_one(
    workers: Workers, tiny_model: Path, tmp_path: Path, failure: str, lora: bool
) -> None:
    (tmp_path / "file").touch()
    task = Task(path=str(tiny_model), zero=ZeroConfig(stage=3), lora=lora)
    results = workers.run(sync, task, failure, str(tmp_path))
    assert len(results) == 2
    for text, seconds, total in results:
        with pytest.raises(RolloutError, match=FAILURES[failure]):
            raise RolloutError(text)
        assert seconds < SECONDS
        assert total == 3.0, "the next collectives are in step"
