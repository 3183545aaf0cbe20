"""Weights on their way to engines: what a killed run left in a machine's memory goes, what a living one holds stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from alignment.rollout.weights import FileWeightTransfer, sweep

WRITER = """
import sys
from pathlib import Path
import torch
from alignment.rollout.weights import FileWeightTransfer

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
