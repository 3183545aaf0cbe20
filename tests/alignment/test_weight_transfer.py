"""Weights on their way to engines as files, of which none outlives its run for long; other transfers by their names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from alignment.rollout.transfer import EngineLocations
from alignment.rollout.transfer.files import FileWeightTransfer, NearestFileTransfer, sweep
from alignment.settings.plugins import load_weight_transfer
from alignment.settings.run import RolloutConfig

WRITER = """
import sys
from pathlib import Path
import torch
from alignment.rollout.transfer.files import FileWeightTransfer

class Two:
    version = 3
    def named_weights(self):
        yield "a", torch.ones(2)
        yield "b", torch.ones(3)

FileWeightTransfer(sys.argv[2], (Path(sys.argv[1]),)).send(Two(), adapter=False)
print("written", flush=True)
sys.stdin.read()
"""


def start(place: Path, name: str) -> subprocess.Popen[str]:
    """A process that has written weights and goes on."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(place), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    return process


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_what_a_killed_run_has_left_goes_and_what_a_living_one_holds_stays(tmp_path: Path) -> None:
    killed, living = start(tmp_path, "raylign-killed"), start(tmp_path, "raylign-living")
    (tmp_path / "somebody-weights-3-1").mkdir()
    both = names(tmp_path)
    sweep((tmp_path,), settled_s=0)
    assert names(tmp_path) == both, "both live"
    killed.kill()
    killed.wait()
    sweep((tmp_path,))
    assert names(tmp_path) == both, "a folder as young as that may not be locked yet"
    sweep((tmp_path,), settled_s=0)
    assert names(tmp_path) == ["raylign-living-weights-3-1", "somebody-weights-3-1"]
    living.communicate()
    sweep((tmp_path,), settled_s=0)
    assert names(tmp_path) == ["somebody-weights-3-1"]


def test_a_transfer_leaves_nothing_and_holds_nothing_once_it_is_cleared(tmp_path: Path) -> None:
    transfer = FileWeightTransfer("raylign-x", (tmp_path,))
    folder = transfer._folder(tmp_path, version=1)
    assert transfer._folder(tmp_path, version=1) == folder
    transfer.clear()
    assert names(tmp_path) == []
    assert transfer._locks == []


class OneWeight:
    """A trainer's side with one weight."""

    version = 1

    def save_adapter(self, folder: Path) -> bool:
        return False

    def participate(self) -> None: ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "weight", torch.arange(3.0)


def test_files_go_to_the_folder_that_all_see_only_while_an_engine_is_elsewhere(tmp_path: Path) -> None:
    are_here = True
    transfer_class = load_weight_transfer("files")
    assert transfer_class is NearestFileTransfer
    transfer = transfer_class(
        f"raylign-{os.getpid()}", EngineLocations(are_here=lambda: are_here, shared_folder=tmp_path)
    )
    for are_here in (True, False, True):
        update = transfer.send(OneWeight(), adapter=False)
        (file,) = update.update_info["files"]
        assert Path(file).is_relative_to(tmp_path) is not are_here
        assert [(name, weight.tolist()) for name, weight in transfer_class.receive(update.update_info)] == [
            ("weight", [0.0, 1.0, 2.0])
        ]
    transfer.clear()
    assert names(tmp_path) == []
    assert not Path(file).exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "there is no weight transfer 'file'; did you mean 'files'"),
        ("nowhere:Transfer", "weight transfer 'nowhere:Transfer' cannot be imported"),
        ("tests.alignment.bytes_transfer:load", "is a function, not a class"),
        ("builtins:dict", "has no send, sweep, receive, adapter_folder"),
    ],
)
def test_a_transfer_that_there_is_not_is_refused_with_the_configuration(name: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        RolloutConfig(weight_transfer=name)
