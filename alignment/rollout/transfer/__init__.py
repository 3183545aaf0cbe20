"""The port through which the trainer's weights come into engines.

    trainer: WeightTransfer.send ─► WeightUpdate ─► engine: WeightTransfer.receive ─► the model's weights

It has the shape of vLLM's own weight transfer: a side that sends, a side that receives, and information about each
update, which only the two sides understand. `alignment.vllm.reload` loads what the receiving side yields.

A new transfer is one file in this folder, which `TRANSFER` names: `weight_transfer: files` is `files.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from alignment.rollout import Weights

PREFIX = "raylign-"
"""Prefix of all transfers' names on a machine."""


@dataclass(frozen=True, kw_only=True)
class WeightUpdate:
    """One version of the weights on its way to the engines. The update itself is sent to other processes."""

    version: int
    """Number of optimizer steps behind the weights."""
    is_adapter: bool
    """True if the weights are a LoRA adapter, false if they are all weights."""
    update_info: dict[str, Any]
    """What the receiving side needs, by names of the transfer's own: text, numbers, bytes, and lists or dicts of them.
    With an adapter, it is another one for each update."""


@dataclass(frozen=True, kw_only=True)
class EngineLocations:
    """Where a run's engines are, as far as a transfer has to know it."""

    are_here: Callable[[], bool]
    """Says whether all engines are on this machine. The answer may change, as a lost engine may come back on another
    machine."""
    shared_folder: Path | None = None
    """A folder that all machines see; None if this machine is the only one."""


class WeightTransfer(Protocol):
    """The port: how weights get from the trainer into engines.

    The sending side is an object. Every training worker and the process that started the run make one: the main worker
    sends and clears, and the starting process clears at the end. So what it needs is opened in `send`.

    The receiving side is two functions without an object:
    they are called in the processes of engines, and know only the update. Any number of engines may receive an update,
    each as often as it is started again, until the next `send` or `clear`.
    """

    def __init__(self, name: str, engines: EngineLocations) -> None:
        """Makes the sending side; it sends nothing before `send`.

        Args:
            name: a name that no other run on the machine has. What is left on a machine has to bear it.
            engines: where the engines are.
        """

    def send(self, weights: Weights, *, adapter: bool) -> WeightUpdate:
        """Makes weights available to engines, and withdraws the previous ones.

        Args:
            adapter: whether to send an adapter rather than all weights.

        Raises:
            RolloutError: they cannot be sent, or an adapter is to be sent and the trainer has none.
        """

    def clear(self) -> None:
        """Withdraws the weights, also those that an earlier process of the same name has left."""

    @staticmethod
    def sweep() -> None:
        """Deletes what processes that were killed have left on this machine, under any name."""

    @staticmethod
    def receive(update_info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Yields each weight of an update of all weights, once, by its Hugging Face name.

        It is called in each process that holds an engine's weights. A weight must stay valid while others are taken.
        """

    @staticmethod
    def adapter_folder(update_info: dict[str, Any]) -> Path:
        """The folder of an update's adapter, as peft writes it. It is called in the process that uses the engine."""
