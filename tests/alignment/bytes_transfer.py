"""A second weight transfer: weights travel as bytes within the update, so that no file system has to be shared."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from alignment.rollout import Weights
from alignment.rollout.transfer import EngineLocations, WeightUpdate


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
                assert weights.save_adapter(Path(folder))
                files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
            info = {"adapter": files}
        return WeightUpdate(version=weights.version, is_adapter=adapter, update_info=info)

    def clear(self) -> None:
        """Does nothing: an update ends with the last reference to it."""

    @staticmethod
    def sweep() -> None:
        """Does nothing: a process that is killed leaves nothing."""

    @staticmethod
    def receive(update_info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Yields the weights of the bytes."""
        yield from load(update_info["weights"]).items()

    @staticmethod
    def adapter_folder(update_info: dict[str, Any]) -> Path:
        """Writes the adapter to a folder of the engine's machine, as vLLM reads adapters from folders."""
        folder = Path(tempfile.mkdtemp())
        for name, content in update_info["adapter"].items():
            (folder / name).write_bytes(content)
        return folder
