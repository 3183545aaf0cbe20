"""Weight transfer by files: it brings the trainer's weights into vLLM engines through shared memory.

An adapter is sent as the folder that peft writes, and all weights as safetensors files of bounded size. vLLM's own
transports need CUDA. This one only needs a file system that both processes see, so it works on CPUs and on GPUs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from alignment.errors import RolloutError
from alignment.rollout import Weights
from alignment.rollout.transfer import PREFIX, EngineLocations, WeightUpdate

SHARD_BYTES = 64 << 20
"""Bytes of weights that are copied before they are written, which is the extra memory of a sync."""
SHARED_MEMORY = Path("/dev/shm")
"""Folder of a Linux machine's shared memory."""
SETTLED_S = 60.0
"""Age (s) after which a folder has been locked by its writer, if the writer is alive."""


def local_directories() -> tuple[Path, ...]:
    """Folders through which processes of one machine can exchange files: shared memory first, then the disk."""
    temporary = Path(tempfile.gettempdir())
    return (SHARED_MEMORY, temporary) if SHARED_MEMORY.is_dir() else (temporary,)


class FileWeightTransfer:
    """Sends a trainer's weights as files. The newest update is kept until the next one, for restarted engines."""

    def __init__(self, name: str, directories: tuple[Path, ...]) -> None:
        """Makes a transfer; it writes nothing before `send`.

        Args:
            name: a name that no other run on the machine has. All file names begin with it.
            directories: folders in the order of preference; if one is full, the next one is used.
        """
        self.name = name
        self.directories = directories
        self.num_updates = 0
        self._locks: list[int] = []

    def send(self, weights: Weights, *, adapter: bool) -> WeightUpdate:
        """Writes weights, and deletes the previous ones.

        Args:
            adapter: whether to send an adapter rather than all weights.

        Raises:
            RolloutError: there is no room, or an adapter is to be sent and the trainer has none.
        """
        from safetensors import SafetensorError

        self.clear()
        self.num_updates += 1
        try:
            return self._send_adapter(weights) if adapter else self._send_all(weights)
        except (OSError, SafetensorError) as error:
            raise RolloutError(f"the weights for the engines cannot be written: {error}") from error

    def clear(self) -> None:
        """Deletes all files of this run, also those of an earlier process that was killed."""
        while self._locks:
            os.close(self._locks.pop())
        for directory in self.directories:
            for folder in directory.glob(f"{self.name}-weights-*"):
                shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def sweep() -> None:
        """Deletes files that killed processes have left in this machine's memory."""
        sweep()

    @staticmethod
    def receive(update_info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Yields each weight of an update by name, mapped into memory rather than copied."""
        from safetensors import safe_open

        for file in update_info["files"]:
            with safe_open(file, framework="pt") as tensor_file:
                for name in tensor_file.keys():  # noqa: SIM118  # not a dict
                    yield name, tensor_file.get_tensor(name)

    @staticmethod
    def adapter_folder(update_info: dict[str, Any]) -> Path:
        """The folder of an update's adapter, which has a new name for each update."""
        return Path(update_info["folder"])

    def _send_adapter(self, weights: Weights) -> WeightUpdate:
        """Writes an adapter as peft does, to the last directory."""
        folder = self._folder(self.directories[-1], version=weights.version)
        if not weights.save_adapter(folder):
            raise RolloutError("the engines were started for an adapter (model.lora), and the trainer has none")
        return WeightUpdate(version=weights.version, is_adapter=True, update_info={"folder": str(folder)})

    def _send_all(self, weights: Weights) -> WeightUpdate:
        """Writes all weights as safetensors files of bounded size."""
        from safetensors.torch import save_file

        files: list[str] = []
        for shard in _shards(weights.named_weights()):
            directory = self._directory_for(sum(tensor.nbytes for tensor in shard.values()))
            file = self._folder(directory, version=weights.version) / f"{len(files):05d}.safetensors"
            save_file(shard, file)
            files.append(str(file))
        return WeightUpdate(version=weights.version, is_adapter=False, update_info={"files": files})

    def _directory_for(self, size: int) -> Path:
        """The first directory with twice as much room as `size` bytes, else the last one."""
        candidates = (directory for directory in self.directories if shutil.disk_usage(directory).free > 2 * size)
        return next(candidates, self.directories[-1])

    def _folder(self, directory: Path, *, version: int) -> Path:
        """The folder of this update in a directory; makes and locks it on first use."""
        folder = directory / f"{self.name}-weights-{version}-{self.num_updates}"
        if not folder.exists():
            folder.mkdir(parents=True)
            self._locks += _lock(folder, fcntl.LOCK_SH)
        return folder


class NearestFileTransfer(FileWeightTransfer):
    """Sends weights through shared memory if all engines are on this machine, else through the folder that all see.

    It asks for that at each sync, because a lost engine may come back on another machine.
    """

    def __init__(self, name: str, engines: EngineLocations) -> None:
        shared_folders = () if engines.shared_folder is None else (engines.shared_folder,)
        super().__init__(name, (*local_directories(), *shared_folders))
        self.engines = engines

    def send(self, weights: Weights, *, adapter: bool) -> WeightUpdate:
        """Writes weights to the nearest directory that all engines can read."""
        self.clear()  # in the directories of the last update
        folder = self.engines.shared_folder
        self.directories = local_directories() if folder is None or self.engines.are_here() else (folder,)
        return super().send(weights, adapter=adapter)


def _lock(folder: Path, kind: int) -> list[int]:
    """Locks a folder until the returned descriptor is closed or this process ends; returns none if that fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:  # another process has the lock, or the network file system has no such locks
        os.close(descriptor)
        return []
    return [descriptor]


def sweep(directories: tuple[Path, ...] | None = None, *, settled_s: float = SETTLED_S) -> None:
    """Deletes files that killed processes have left in this machine's memory.

    Args:
        directories: folders to look in; None means the local directories.
        settled_s: a folder that is younger (s) is left alone.
    """
    pattern = f"{PREFIX}*-weights-*"
    for folder in (folder for directory in directories or local_directories() for folder in directory.glob(pattern)):
        with contextlib.suppress(OSError):  # another process may delete it at the same time
            if time.time() - folder.stat().st_mtime >= settled_s:
                for descriptor in _lock(folder, fcntl.LOCK_EX):
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(descriptor)


def _shards(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Collects tensors into dictionaries of about SHARD_BYTES each."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        # It must be copied, because a gathered tensor is valid only until the next one.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


TRANSFER = NearestFileTransfer
