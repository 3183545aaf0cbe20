"""An endpoint takes the address of a run in a storage where it takes a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import CheckpointError
from alignment.models.model_folder import ModelFolder
from alignment.run_folder import RunFolder
from alignment.storage import StoredFolders
from serving.registry.checkpoints import local_path, name_of
from serving.registry.promote import _candidate_version
from serving.registry.served_model import _checkpoint_folder
from serving.registry.versions import Registry
from tests.serving.tiny import of_run

RUN = "memory://bucket/runs/demo"


@pytest.fixture
def stored_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoredFolders]:
    """A run with the adapters of two steps."""
    import fsspec

    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    stored = StoredFolders.open(f"{RUN}/checkpoints")
    for step in (4, 8):
        stored.upload(of_run(tmp_path / "demo", step, seed=step))
    yield stored
    fsspec.filesystem("memory").store.clear()


def test_the_newest_checkpoint_of_an_address_becomes_a_version_once(stored_run: StoredFolders, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    version = registry.add(local_path(RUN))
    assert version.name == "demo-step-00000008" and version.number == 1
    assert registry.add(local_path(f"{RUN}/checkpoints/step-00000008")).number == 1
    assert registry.add(local_path(f"{RUN}/checkpoints/step-00000004")).number == 2
    assert version.data == "fingerprint"
    original, weights = RunFolder(tmp_path / "demo").checkpoint(8), "adapter_model.safetensors"
    assert (registry.folder_of(1) / weights).read_bytes() == (original / weights).read_bytes()
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run with a complete one"):
        local_path("memory://bucket/runs/other")


def test_an_endpoint_is_named_after_the_run_of_an_address(stored_run: StoredFolders) -> None:
    assert name_of(RUN) == "demo"
    assert name_of(f"{RUN}/checkpoints/step-00000004") == "demo-step-00000004"
    assert ModelFolder(_checkpoint_folder(RUN)).is_adapter, "which is served with its base, and not merged"


def test_a_promotion_hands_the_address_to_the_endpoint_as_it_is() -> None:
    addresses: list[str] = []

    class Client:
        def register(self, checkpoint: str) -> None:
            addresses.append(checkpoint)

    client: Any = Client()
    _candidate_version(client, RUN)
    _candidate_version(client, "runs/demo")
    assert addresses == [RUN, str(Path("runs/demo").absolute())]
