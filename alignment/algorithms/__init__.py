"""Algorithms: what each needs of a group, and its loss. The module's name is the registry: `algorithm: {name: dpo}`."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from alignment.config import AlgorithmConfig
from alignment.types import Batch, Group, Loss, Outputs


class Algorithm(AlgorithmConfig):
    """A frozen set of hyper-parameters, and two pure methods.

    A new algorithm is one file in this folder with a subclass of this, named by `ALGORITHM`, and one recipe.
    """

    needs_reference: ClassVar[bool] = False
    """True if the loss compares the actor with a frozen reference model."""

    @abstractmethod
    def select(self, group: Group) -> Group:
        """Keeps the completions that this algorithm learns from.

        Raises:
            DataError: the group has nothing for this algorithm; the text says what is missing.
        """

    @abstractmethod
    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        """Loss of one micro-batch: unreduced terms with their unit, and metrics."""
