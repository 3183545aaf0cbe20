"""Rollout's other half: the trainer's weights on their way into vLLM engines, as files in shared memory.

    trainer: Outbox.put ─► files of an Update ─► engine: one start→finish session of vLLM's weight transfer

An adapter travels as the folder that peft writes, all weights as safetensors files of bounded size. vLLM's own
transports need CUDA; this one needs memory that both processes see, so it also serves as the plain way on GPUs.
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
"""What vLLM knows our weight transfer by."""
WORKER = "alignment.rollout.worker.EngineWorker"
"""vLLM's `worker_extension_cls` of every engine of ours: where vLLM imports it, it knows `FILES`."""
SHARD_BYTES = 64 << 20
"""Bytes of weights that are copied before they are written: the extra memory of a sync."""
SHARED_MEMORY = Path("/dev/shm")
PREFIX = "raylign-"
"""What the name of every outbox on a machine begins with."""
SETTLED_S = 60.0
"""Age of a folder that its writer has locked, if that lives."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One version of the weights, as files that an engine can read."""

    version: int
    """Optimizer steps done."""
    adapter: str | None
    """Folder of a LoRA adapter, another one each time; None if all weights are in `files`."""
    files: tuple[str, ...] = ()
    """safetensors files that together hold every weight once, by its Hugging Face name."""


def local_places() -> tuple[Path, ...]:
    """Where processes of one machine can leave weights for each other: shared memory first, then the disk."""
    temporary = Path(tempfile.gettempdir())
    return (SHARED_MEMORY, temporary) if SHARED_MEMORY.is_dir() else (temporary,)


class Outbox:
    """Where a trainer leaves its weights. The newest update stays, for engines that are restarted, until the next."""

    def __init__(self, name: str, places: tuple[Path, ...]) -> None:
        """
        Args:
            name: of this run, unlike any other's on the machine; all it writes begins with it.
            places: folders in order of preference; the next is used when one is full.
        """
        self.name = name
        self.places = places
        self.count = 0
        self._locks: list[int] = []

    def put(self, weights: Weights, *, adapter: bool) -> Update:
        """Writes weights, in place of those before.

        Raises:
            RolloutError: there is no room, or an adapter was promised and there is none.
        """
        from safetensors import SafetensorError

        self.clear()
        self.count += 1
        try:
            return self._put_adapter(weights) if adapter else self._put_all(weights)
        except (OSError, SafetensorError) as error:
            raise RolloutError(f"the weights for the engines cannot be written: {error}") from error

    def clear(self) -> None:
        """Deletes what this run has written, also in an earlier process that was killed."""
        while self._locks:
            os.close(self._locks.pop())
        for place in self.places:
            for folder in place.glob(f"{self.name}-weights-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _put_adapter(self, weights: Weights) -> Update:
        folder = self._folder(self.places[-1], version=weights.version)
        if not weights.save_adapter(folder):
            raise RolloutError("the engines were started for an adapter (model.lora), and the trainer has none")
        return Update(version=weights.version, adapter=str(folder))

    def _put_all(self, weights: Weights) -> Update:
        from safetensors.torch import save_file

        files: list[str] = []
        for shard in _shards(weights.named_weights()):
            place = self._place_for(sum(tensor.nbytes for tensor in shard.values()))
            file = self._folder(place, version=weights.version) / f"{len(files):05d}.safetensors"
            save_file(shard, file)
            files.append(str(file))
        return Update(version=weights.version, adapter=None, files=tuple(files))

    def _place_for(self, size: int) -> Path:
        roomy = (place for place in self.places if shutil.disk_usage(place).free > 2 * size)
        return next(roomy, self.places[-1])

    def _folder(self, place: Path, *, version: int) -> Path:
        folder = place / f"{self.name}-weights-{version}-{self.count}"
        if not folder.exists():
            folder.mkdir(parents=True)
            self._locks += _lock(folder, fcntl.LOCK_SH)
        return folder


def _lock(folder: Path, kind: int) -> list[int]:
    """The descriptor of a folder that is locked now, until it is closed or this process ends; none if it cannot be."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:  # another has it, or it is on a network file system that has no such locks
        os.close(descriptor)
        return []
    return [descriptor]


def sweep(places: tuple[Path, ...] | None = None, *, settled_s: float = SETTLED_S) -> None:
    """Deletes from this machine's memory what runs have left there whose processes were killed.

    Args:
        places: where to look; None is where outboxes of one machine write.
        settled_s: age (s) up to which a folder is left alone.
    """
    for folder in (folder for place in places or local_places() for folder in place.glob(f"{PREFIX}*-weights-*")):
        with contextlib.suppress(OSError):  # another one deletes it just now
            if time.time() - folder.stat().st_mtime >= settled_s:
                for descriptor in _lock(folder, fcntl.LOCK_EX):
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(descriptor)


class GatherOnce:
    """The main worker's `Weights`, gathered exactly once, whatever fails there: before it, meanwhile or after.

    The other workers are in `participate` all the while, whose collectives need this worker. If it gave up and went on to
    another collective, both would wait for ever, or take one's data for the other's.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._rest: Iterator[tuple[str, Tensor]] | None = None
        """What is still to be gathered; None is everything."""

    @property
    def version(self) -> int:
        """Optimizer steps done."""
        return self._weights.version

    def save_adapter(self, folder: Path) -> bool:
        """As the port says."""
        self._rest = iter(())  # everything is gathered before anything is written
        is_adapter = self._weights.save_adapter(folder)
        if not is_adapter:
            self._rest = None
        return is_adapter

    def participate(self) -> None:
        """As the port says."""
        self._rest = iter(())
        self._weights.participate()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """As the port says."""
        self._rest = self._weights.named_weights()
        return self._rest

    def complete(self) -> None:
        """Takes part in what is left to gather."""
        if self._rest is None:
            self.participate()
        else:
            for _ in self._rest:
                pass


def _shards(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        # A copy: a gathered tensor is only there until the next one.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def read(files: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of some safetensors files, mapped, not copied."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict
                yield name, opened.get_tensor(name)


def install() -> None:
    """Makes a process of one of our engines what we need; `alignment.rollout.worker` calls it there, and only there."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from alignment.rollout import adapter_speed

    _end_with_owner()
    # Linux kills a process that uses AMX without having asked for it. vLLM's attention does, unless a product of
    # matrices has asked before, which one of one or two tokens may not. Elsewhere this does nothing.
    torch.cpu._init_amx()
    adapter_speed.install()
    WeightTransferEngineFactory.register_engine(FILES, _receiver())


def _end_with_owner() -> None:
    """Ends this process when the one that started the engine is gone, killed even: an engine alone is only heat."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    core, owner_of_core = parent.pid, _parent_of(parent.pid)

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    def watch_core() -> None:
        while _parent_of(core) == owner_of_core:
            time.sleep(1.0)
        os.kill(core, signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    if parent.name.startswith("EngineCore"):  # of an engine of several workers, it imports nothing of ours
        threading.Thread(target=watch_core, name="lifeline of EngineCore", daemon=True).start()


def _parent_of(process: int) -> int:
    """Id of a process's parent: another one than before when that has ended. As Linux says it."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@dataclass
class NoInit:
    """What vLLM's side of the transfer has to know beforehand: nothing."""


@dataclass
class FilesInfo:
    """What vLLM's side of the transfer is told for an update."""

    files: list[str]


def _receiver() -> type[Any]:
    """vLLM's side of the transfer. A class made here, because its base can only be had by importing vLLM."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    class FilesReceiver(WeightTransferEngine):  # type: ignore[misc]
        init_info_cls = NoInit
        update_info_cls = FilesInfo

        def init_transfer_engine(self, init_info: NoInit) -> None: ...

        def start_weight_update(self) -> None:
            self.missing = {name for name, _ in self.model.named_parameters()} - _tied_names(self.model)
            unpack_experts(self.model)
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: FilesInfo) -> None:
            # One call for all files: several would end a layer that is spread over two of them too early.
            self.missing -= self.model.load_weights(read(update_info.files)) or self.missing
            if self.missing:
                raise ValueError(f"an update of all weights lacks {len(self.missing)}, such as {min(self.missing)}")

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            pack_again(self.model)

        def shutdown(self) -> None: ...

    return FilesReceiver


def _tied_names(model: torch.nn.Module) -> set[str]:
    """Names of the weights of output heads that are tied to the embedding."""
    return {f"{name}.weight" for name, _ in _tied_heads(model)}


def _tied_heads(model: torch.nn.Module) -> list[tuple[str, Any]]:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    config: Any = model.config
    if not config.tie_word_embeddings:
        return []
    return [(name, part) for name, part in model.named_modules() if isinstance(part, ParallelLMHead)]


def pack_again(model: torch.nn.Module) -> None:
    """Makes anew what vLLM 0.32 computes with on a CPU in place of the weights, and a layerwise reload leaves old.

    That is the output head that is tied to the embedding: the reload packs a layer whose weight comes by its own name,
    and none comes for that. And it is experts: those are packed when they are loaded first, and never again.
    """
    _tie_again(model)
    for layer in _packed_experts(model):
        layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(layer)


def unpack_experts(model: torch.nn.Module) -> None:
    """Gives experts room for weights as they come, in place of packed ones, which may have been padded."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for layer in _packed_experts(model):
        parameters, _ = get_layerwise_info(layer).restore_metadata
        for name, shape in parameters.items():
            layer.get_parameter(name).data = torch.empty_like(shape, device="cpu")


def _packed_experts(model: torch.nn.Module) -> list[Any]:
    """Layers of experts, where vLLM packs them."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    layers: list[Any] = [part for part in model.modules() if isinstance(part, RoutedExperts)]
    return [layer for layer in layers if isinstance(layer.quant_method, UnquantizedFusedMoEMethod)]


def _tie_again(model: torch.nn.Module) -> None:
    """Gives output heads that are tied to the embedding its new weights."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for _, head in _tied_heads(model):
        embedding = next(
            part
            for part in model.modules()
            if isinstance(part, VocabParallelEmbedding) and not isinstance(part, ParallelLMHead)
        )
        head.tie_weights(embedding)
        head.quant_method.process_weights_after_loading(head)
