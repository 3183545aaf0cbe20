"""A second weight transfer: weights travel as bytes within the update, so that no file system has to be shared."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from alignment.errors import RolloutError
from alignment.rollout import Weights
from alignment.rollout.transfer import EngineLocations, WeightUpdate

FOLDER = Path(tempfile.gettempdir()) / "raylign-bytes"
"""Adapters of this machine's engines, in a folder for each of their processes."""


class BytesTransfer:
    """Sends all weights as the bytes of one safetensors file, and an adapter as the bytes of its files."""

    def __init__(self, name: str, engines: EngineLocations) -> None:
        self.num_updates = 0

    def send(self, weights: Weights, *, adapter: bool) -> WeightUpdate:
        """Reads the weights into bytes."""
        self.num_updates += 1
        if not adapter:
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in weights.named_weights()}
            info: dict[str, Any] = {"weights": save(tensors)}
        else:
            with tempfile.TemporaryDirectory() as folder:
                if not weights.save_adapter(Path(folder)):
                    raise RolloutError("the engines were started for an adapter, and the trainer has none")
                files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
            info = {"adapter": files, "number": self.num_updates}
        return WeightUpdate(version=weights.version, is_adapter=adapter, update_info=info)

    def clear(self) -> None:
        """Does nothing: an update ends with the last reference to it."""

    @staticmethod
    def sweep() -> None:
        """Deletes the adapters of engines that have ended."""
        for folder in FOLDER.glob("*"):
            if not Path("/proc", folder.name).exists():
                shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def receive(update_info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Yields the weights of the bytes."""
        yield from load(update_info["weights"]).items()

    @staticmethod
    def adapter_folder(update_info: dict[str, Any]) -> Path:
        """Writes the adapter to a folder of the engine's machine, in place of the one before: vLLM reads folders."""
        shutil.rmtree(FOLDER / str(os.getpid()), ignore_errors=True)
        folder = FOLDER / str(os.getpid()) / str(update_info["number"])
        folder.mkdir(parents=True)
        for name, content in update_info["adapter"].items():
            (folder / name).write_bytes(content)
        return folder
