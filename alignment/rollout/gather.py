"""The gathering of the actor's weights for the engines, which all training workers take part in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from alignment.rollout import Weights


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
