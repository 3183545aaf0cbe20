"""Algorithms: what each needs of a group, and its loss. The module's name is the registry: `algorithm: {name: dpo}`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from alignment.config import AlgorithmConfig
from alignment.types import Batch, Group, Loss, Outputs


class Algorithm(AlgorithmConfig):
    """A frozen set of hyper-parameters, and two pure methods.

    A new algorithm is one file in this folder with a subclass of this, named by `ALGORITHM`, and one recipe.
    """

    @abstractmethod
    def select(self, group: Group) -> Group:
        """Keeps the completions that this algorithm learns from.

        Raises:
            DataError: the group has nothing for this algorithm; the text says what is missing.
        """

    @abstractmethod
    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        """Loss of one micro-batch: unreduced terms with their unit, and metrics."""


class ReferencedAlgorithm(Algorithm):
    """An algorithm whose loss compares the actor with the frozen model that training started from."""

    reference: Literal["auto", "adapter_off", "copy", "precomputed"] = "auto"
    """Where log π_ref comes from. `adapter_off`: the same weights without the adapter (LoRA only). `copy`: a frozen
    copy of the starting model. `precomputed`: log-probabilities of all groups are computed before the first step and
    kept beside the run, so that no second model stays in memory. `auto` is `adapter_off` with LoRA, else `copy`."""
