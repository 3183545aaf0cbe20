"""Weight transfer by files: it brings the trainer's weights into vLLM engines through shared memory.

    trainer: FileWeightTransfer.send ─► files of a WeightUpdate ─► engine: one session of vLLM's weight transfer

An adapter is sent as the folder that peft writes, and all weights as safetensors files of bounded size. vLLM's own
transports need CUDA. This one only needs a file system that both processes see, so it works on CPUs and on GPUs.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.errors import RolloutError
from alignment.rollout import Weights

FILES = "raylign_files"
"""The name by which vLLM knows this weight transfer."""
WORKER = "alignment.rollout.worker.EngineWorker"
"""vLLM's `worker_extension_cls` of all our engines. A process that imports it registers `FILES`."""
SHARD_BYTES = 64 << 20
"""Bytes of weights that are copied before they are written, which is the extra memory of a sync."""
SHARED_MEMORY = Path("/dev/shm")
"""Folder of a Linux machine's shared memory."""
PREFIX = "raylign-"
"""Prefix of all transfers' names on a machine."""
SETTLED_S = 60.0
"""Age (s) after which a folder has been locked by its writer, if the writer is alive."""


@dataclass(frozen=True, kw_only=True)
class WeightUpdate:
    """One version of the weights, as files that an engine can read."""

    version: int
    """Number of optimizer steps behind the weights."""
    adapter: str | None
    """Folder of a LoRA adapter, with a new name for each update; None if `files` hold all weights."""
    files: tuple[str, ...] = ()
    """safetensors files that together hold each weight once, by its Hugging Face name."""


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

    def _send_adapter(self, weights: Weights) -> WeightUpdate:
        """Writes an adapter as peft does, to the last directory."""
        folder = self._folder(self.directories[-1], version=weights.version)
        if not weights.save_adapter(folder):
            raise RolloutError("the engines were started for an adapter (model.lora), and the trainer has none")
        return WeightUpdate(version=weights.version, adapter=str(folder))

    def _send_all(self, weights: Weights) -> WeightUpdate:
        """Writes all weights as safetensors files of bounded size."""
        from safetensors.torch import save_file

        files: list[str] = []
        for shard in _shards(weights.named_weights()):
            directory = self._directory_for(sum(tensor.nbytes for tensor in shard.values()))
            file = self._folder(directory, version=weights.version) / f"{len(files):05d}.safetensors"
            save_file(shard, file)
            files.append(str(file))
        return WeightUpdate(version=weights.version, adapter=None, files=tuple(files))

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


class GatherOnce:
    """Wraps the main worker's `Weights` so that they are gathered exactly once, even if their sending fails.

    Meanwhile the other workers are in `participate`, whose collectives need this worker. If this worker left early and
    began another collective, the workers would wait for each other forever, or mix up the data of two collectives.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._iterator: Iterator[tuple[str, Tensor]] | None = None
        """The weights that are still to be gathered; None means all of them."""

    @property
    def version(self) -> int:
        """Number of optimizer steps behind the weights."""
        return self._weights.version

    def save_adapter(self, folder: Path) -> bool:
        """Gathers and writes the adapter; false if all weights are trained."""
        self._iterator = iter(())  # the adapter is gathered completely before anything is written
        is_adapter = self._weights.save_adapter(folder)
        if not is_adapter:
            self._iterator = None
        return is_adapter

    def participate(self) -> None:
        """Takes part in gathering the weights."""
        self._iterator = iter(())
        self._weights.participate()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields each weight by its Hugging Face name."""
        self._iterator = self._weights.named_weights()
        return self._iterator

    def complete(self) -> None:
        """Gathers the weights that have not been gathered yet."""
        if self._iterator is None:
            self.participate()
        else:
            for _ in self._iterator:
                pass


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


def read(files: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields each tensor of some safetensors files by name, mapped into memory rather than copied."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensor_file:
            for name in tensor_file.keys():  # noqa: SIM118  # not a dict
                yield name, tensor_file.get_tensor(name)


def install() -> None:
    """Prepares a process of one of our vLLM engines; only `alignment.rollout.worker` calls this, in that process."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from alignment.rollout import adapter_speed

    _end_with_owner()
    # Linux kills a process that uses AMX without a request for it. vLLM's attention uses AMX without one. A matrix
    # product makes the request, but may not do so for one or two tokens. On other machines this does nothing.
    torch.cpu._init_amx()
    adapter_speed.install()
    WeightTransferEngineFactory.register_engine(FILES, _receiver())


def _end_with_owner() -> None:
    """Ends this process as soon as the process that started the engine has ended, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    core, core_parent = parent.pid, _parent_of(parent.pid)

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    def watch_core() -> None:
        while _parent_of(core) == core_parent:
            time.sleep(1.0)
        os.kill(core, signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    if parent.name.startswith("EngineCore"):  # it belongs to an engine of several workers, and imports nothing of ours
        threading.Thread(target=watch_core, name="lifeline of EngineCore", daemon=True).start()


def _parent_of(process: int) -> int:
    """The id of a process's parent, read from Linux's /proc. It changes when the parent ends."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@dataclass
class NoInit:
    """The information that vLLM's side of the transfer needs before the first update: none."""


@dataclass
class FilesInfo:
    """The information that vLLM's side of the transfer needs for an update."""

    files: list[str]
    """Paths of the safetensors files."""


def _receiver() -> type[Any]:
    """Makes the class of vLLM's side of the transfer. It is made in a function, because its base class needs vLLM."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    class FilesReceiver(WeightTransferEngine):  # type: ignore[misc]
        init_info_cls = NoInit
        update_info_cls = FilesInfo

        def init_transfer_engine(self, init_info: NoInit) -> None: ...

        def start_weight_update(self) -> None:
            self.missing_names = {name for name, _ in self.model.named_parameters()} - _tied_names(self.model)
            unpack_experts(self.model)
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: FilesInfo) -> None:
            # All files are loaded in one call, because a layer may be spread over two files.
            self.missing_names -= self.model.load_weights(read(update_info.files)) or self.missing_names
            if self.missing_names:
                example = min(self.missing_names)
                raise ValueError(f"an update of all weights lacks {len(self.missing_names)}, such as {example}")

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            pack_again(self.model)

        def shutdown(self) -> None: ...

    return FilesReceiver


def _tied_names(model: torch.nn.Module) -> set[str]:
    """The weight names of output heads that are tied to the embedding."""
    return {f"{name}.weight" for name, _ in _tied_heads(model)}


def _tied_heads(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The output heads that are tied to the embedding, with their names."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    config: Any = model.config
    if not config.tie_word_embeddings:
        return []
    return [(name, submodule) for name, submodule in model.named_modules() if isinstance(submodule, ParallelLMHead)]


def pack_again(model: torch.nn.Module) -> None:
    """Packs again the weights that a layerwise reload of vLLM 0.32 does not pack, on a CPU.

    On a CPU, vLLM computes with packed copies of weights. The reload packs a layer when it gets a weight by the layer's
    own name. An output head that is tied to the embedding gets none, so its packed copy would stay old. Experts are
    packed only when they are loaded for the first time.
    """
    _tie_again(model)
    for layer in _packed_experts(model):
        layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(layer)


def unpack_experts(model: torch.nn.Module) -> None:
    """Replaces the packed weights of experts, which may be padded, by empty tensors of the shapes to be loaded."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for layer in _packed_experts(model):
        parameters, _ = get_layerwise_info(layer).restore_metadata
        for name, shape in parameters.items():
            layer.get_parameter(name).data = torch.empty_like(shape, device="cpu")


def _packed_experts(model: torch.nn.Module) -> list[Any]:
    """The layers of experts whose weights vLLM packs."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    layers: list[Any] = [submodule for submodule in model.modules() if isinstance(submodule, RoutedExperts)]
    return [layer for layer in layers if isinstance(layer.quant_method, UnquantizedFusedMoEMethod)]


def _tie_again(model: torch.nn.Module) -> None:
    """Gives tied output heads the new weights of the embedding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for _, head in _tied_heads(model):
        embedding = next(
            submodule
            for submodule in model.modules()
            if isinstance(submodule, VocabParallelEmbedding) and not isinstance(submodule, ParallelLMHead)
        )
        head.tie_weights(embedding)
        head.quant_method.process_weights_after_loading(head)
