"""What keeps a run's result is tried before its first step, and says in one kind of error what it could not write."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import checkpoint
from alignment.checkpoint import Progress
from alignment.distributed.world import World
from alignment.errors import CheckpointError, ConfigError
from alignment.identity import Identity
from alignment.metrics import Silent
from alignment.models.roles import Roles
from alignment.run_folder import find_checkpoint
from alignment.settings.run import RunConfig
from alignment.train import train
from cluster.config import ClusterRunConfig
from cluster.launch import run as launch

Settings = dict[str, Any]

pytestmark = pytest.mark.usefixtures("one_thread")


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: to whoever writes, a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


KINDS: dict[str, Settings] = {
    "full": {},
    "adapter": {"model": {"lora": {"rank": 4}}},
    "reward model": {"algorithm": {"name": "reward_model"}},
    "reward model's adapter": {"algorithm": {"name": "reward_model"}, "model": {"lora": {"rank": 4}}},
}


def configured(run_settings: Settings, kind: str, **changed: Any) -> RunConfig:
    settings = {**run_settings, **KINDS[kind], **changed}
    settings["model"] = {**run_settings["model"], **settings["model"]}
    return RunConfig.model_validate(settings)


@pytest.mark.parametrize("kind", KINDS)
def test_whichever_file_cannot_be_written_the_error_is_ours_and_earlier_checkpoints_are_intact(
    kind: str, run_settings: Settings
) -> None:
    config = configured(run_settings, kind)
    roles = Roles.build(config, World())
    identity = Identity(fixed_settings={}, adjustable_settings={})

    def save(step: int) -> None:
        checkpoint.save(config, roles, Progress(step=step, position=0), identity=identity, world=World())

    save(1)
    intact = find_checkpoint(config.folder)
    sizes = sorted({file.stat().st_size for file in intact.rglob("*") if file.is_file()})
    assert len(sizes) > 5
    for size in sizes:  # one byte too few for each of the files, from COMMITTED to the weights
        with (
            files_of_at_most(size - 1),
            pytest.raises(CheckpointError, match=r"cannot be written: .*; earlier ones are"),
        ):
            save(2)
        assert [folder.name for folder in config.run_folder.checkpoints_folder.iterdir()] == [intact.name]
    assert find_checkpoint(config.folder) == intact
    save(2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_saved_ends_a_run_before_its_first_step(kind: str, run_settings: Settings) -> None:
    config = configured(run_settings, kind, evaluate={"every": 1})
    with files_of_at_most(400), pytest.raises(CheckpointError, match="cannot be written, so no step is taken"):
        train(config, World(), Silent())
    assert not list(config.run_folder.checkpoints_folder.iterdir())
    train(config, World(), Silent())
    assert find_checkpoint(config.folder).name == "step-00000004"


def test_what_tokenizers_do_not_write_is_known_before_the_first_step(run_settings: Settings) -> None:
    roles = Roles.build(config := configured(run_settings, "full"), World())
    roles.actor.tokenizer.init_kwargs["odd"] = object()
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        checkpoint.try_saving(config, roles, world=World())


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_checkpoint_is_known_before_it_is_written(kind: str, run_settings: Settings) -> None:
    config = configured(run_settings, kind)
    roles = Roles.build(config, World())
    expected = checkpoint._num_bytes(config, roles)
    train(config, World(), Silent())
    tensors = find_checkpoint(config.folder).rglob("*.safetensors")
    assert sum(file.stat().st_size for file in tensors) == pytest.approx(expected, rel=0.1, abs=30_000), (
        "but for headers"
    )


def test_a_disk_without_room_for_one_checkpoint_is_refused_with_the_figures(run_settings: Settings) -> None:
    config = configured(run_settings, "full", checkpoint={"every": 1, "keep": 2})
    with pytest.raises(CheckpointError, match=r"takes 2 GB, and 1 GB are free"):
        checkpoint._note_of_room(config, needed_bytes=2 * 10**9, free_bytes=10**9)
    note = checkpoint._note_of_room(config, needed_bytes=2 * 10**9, free_bytes=5 * 10**9)
    assert note is not None and "will need 3 at once" in note
    assert checkpoint._note_of_room(config, needed_bytes=10**9, free_bytes=4 * 10**9) is None
    last_only = configured(run_settings, "full", checkpoint={"every": 0})
    assert checkpoint._note_of_room(last_only, needed_bytes=10**9, free_bytes=10**9) is None


def test_trying_to_save_changes_nothing_of_what_is_trained(run_settings: Settings) -> None:
    roles = Roles.build(config := configured(run_settings, "adapter"), World())
    before = {name: weight.clone() for name, weight in roles.actor.module.state_dict().items()}
    state = torch.get_rng_state()
    assert checkpoint.try_saving(config, roles, world=World()) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in roles.actor.module.state_dict().items())
    assert not list(Path(config.folder).rglob("*.json"))


@pytest.mark.parametrize("what", ["full disk", "a file", "a folder in the way"])
def test_a_run_s_own_configuration_that_cannot_be_written_is_one_line(
    what: str, run_settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / ("file" if what == "a file" else "new")
    if what == "a folder in the way":
        (output / "run" / "config.json").mkdir(parents=True)
    config = ClusterRunConfig.model_validate({**run_settings, "output": str(output)})
    limit = files_of_at_most(100) if what == "full disk" else contextlib.nullcontext()
    with limit, pytest.raises(ConfigError, match=r"^output .* cannot be written: [A-Z]"):
        launch(config)
    if what == "full disk":
        assert not any(file.is_file() for file in config.folder.iterdir())
