"""What happens on one worker is told to all: what it has read, and what goes wrong there."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.distributed.world import World, run_on_main
from alignment.errors import CheckpointError, ConfigError, DataError, ModelError, RolloutError
from alignment.failure import clear_failure, failure_of, propagate_failure
from alignment.metrics import FileReporter, Silent
from alignment.run_folder import RunFolder
from alignment.settings.run import RunConfig
from tests.conftest import pair_rows
from tests.workers import Ended, run_two

Settings = dict[str, Any]
SOON_S = 30.0
"""Within which every worker has to know."""


def train_with(world: World, settings: Settings, largest_file: int | None = None) -> None:
    """A run on this worker.

    Args:
        largest_file: bytes that this worker may write into one file, as on a full disk.
    """
    from alignment.train import train

    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    config = RunConfig.model_validate(settings)
    train(config, world, FileReporter(config, bar=NoBar) if world.is_main else Silent())


class NoBar:
    def __init__(self, **_: Any) -> None: ...
    def update(self, _: int) -> None: ...
    def close(self) -> None: ...


def same_error(ended: list[Ended]) -> BaseException:
    """The error that ended both workers, soon and in the same words."""
    one, other = (each.error for each in ended)
    assert one is not None and other is not None
    assert type(one) is type(other) and str(one) == str(other)
    assert max(each.seconds for each in ended) < SOON_S
    return one


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_a_row_more_on_one_worker_is_refused_with_both_figures(
    algorithm: str, run_settings: Settings, write_rows: Callable[..., Path]
) -> None:
    more = {**run_settings["data"], "path": str(write_rows(pair_rows(25), "more.jsonl"))}
    settings = {**run_settings, "algorithm": {"name": algorithm}}
    error = same_error(run_two(train_with, (settings,), ({**settings, "data": more},)))
    assert isinstance(error, DataError)
    assert "worker 0: 20 groups to train on" in str(error) and "worker 1: 21 groups" in str(error)
    assert not RunFolder(Path(settings["output"]) / "run").read_metrics(), "nothing was learned"


def test_another_held_out_row_on_one_worker_is_refused(run_settings: Settings, write_rows: Callable[..., Path]) -> None:
    rows = pair_rows(6)
    settings = []
    for name in ("one", "other"):
        held_out = write_rows([rows[0], rows[1] if name == "one" else rows[2]], f"{name}.jsonl")
        data = {**run_settings["data"], "eval_groups": 0, "eval": {"path": str(held_out)}}
        settings.append({**run_settings, "data": data})
    error = same_error(run_two(train_with, *((each,) for each in settings)))
    assert "24 groups to train on" in str(error) and str(error).count("2 held out") == 2


def test_streams_that_drift_apart_are_refused_before_the_step_that_would_learn_from_them(
    run_settings: Settings, write_rows: Callable[..., Path]
) -> None:
    rows = pair_rows(24)
    settings = []
    for name, changed in (("one", rows), ("other", [*rows[:6], *rows[7:]])):
        path = write_rows(changed, f"{name}.jsonl")
        data = {"path": str(path), "max_length": 96, "streaming": True, "shuffle": False}
        settings.append({**run_settings, "data": data})
    error = same_error(run_two(train_with, *((each,) for each in settings)))
    assert "other groups for step 2" in str(error) and "other.jsonl:" in str(error)
    assert [line["step"] for line in RunFolder(Path(run_settings["output"]) / "run").read_metrics()] == [1]


def test_a_disk_that_is_full_on_the_main_worker_ends_all(run_settings: Settings) -> None:
    error = same_error(run_two(train_with, (run_settings, 100_000), (run_settings,)))
    assert isinstance(error, CheckpointError) and "cannot be written" in str(error) and "File too large" in str(error)


def test_an_error_that_only_one_worker_can_have_ends_all(run_settings: Settings, tmp_path: Path) -> None:
    """The other waits in a collective of another kind meanwhile."""
    broken = tmp_path / "broken"
    shutil.copytree(run_settings["model"]["path"], broken)
    (broken / "config.json").unlink()
    other = {**run_settings, "model": {**run_settings["model"], "path": str(broken)}}
    assert isinstance(same_error(run_two(train_with, (run_settings,), (other,))), ModelError)


def train_with_key(world: World, settings: Settings, key: str | None) -> None:
    if key is not None:
        os.environ["KEY_OF_THE_SCORER"] = key
    train_with(world, settings)


def test_a_key_that_is_missing_on_one_machine_ends_all(run_settings: Settings) -> None:
    scorer = {"name": "http", "url": "http://127.0.0.1:9/v1/rewards", "key_env": "KEY_OF_THE_SCORER"}
    settings = {**run_settings, "eval_rewards": [scorer], "rollout": {"engine": "local"}}
    error = same_error(run_two(train_with_key, (settings, "secret"), (settings, None)))
    assert isinstance(error, ConfigError) and "KEY_OF_THE_SCORER" in str(error)


def wait_long(world: World) -> str:
    from alignment.distributed import world as world_module

    world_module.ROUND_S = 0.5

    def work() -> str:
        time.sleep(5)
        return "done"

    return run_on_main(work if world.is_main else None, world)


def test_what_only_the_main_worker_does_may_take_longer_than_a_collective() -> None:
    assert [ended.result for ended in run_two(wait_long, (), (), timeout_s=3)] == ["done", "done"]


def test_the_first_error_is_kept_until_the_next_attempt(tmp_path: Path) -> None:
    class EngineStuck(RolloutError):
        """An error that only its module knows."""

    for error in (EngineStuck("the first"), DataError("what followed")):
        with pytest.raises(type(error)), propagate_failure(RunFolder(tmp_path), World()):
            raise error
    kept = failure_of(RunFolder(tmp_path))
    assert type(kept) is RolloutError and str(kept) == "the first", "an error of a kind that others know"
    clear_failure(RunFolder(tmp_path))
    assert failure_of(RunFolder(tmp_path)) is None


def test_a_full_disk_is_an_error_of_ours_whatever_was_being_written(tmp_path: Path) -> None:
    text = r"metrics\.jsonl cannot be written: No space left"
    with pytest.raises(CheckpointError, match=text), propagate_failure(RunFolder(tmp_path), World()):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
    with pytest.raises(FileNotFoundError), propagate_failure(RunFolder(tmp_path), World()):
        (tmp_path / "nowhere").read_text()
    assert json.loads(RunFolder(tmp_path).failure_file.read_text())["kind"] == "CheckpointError"
