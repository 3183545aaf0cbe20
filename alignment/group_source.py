"""The port through which a run gets the groups of every step: from the data, or sampled by engines and scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from alignment.data.stream import GroupStream
from alignment.groups import Group
from alignment.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The groups that one step trains on."""

    groups: list[Group]
    """The whole global batch, the same on every worker."""
    position: int
    """Groups taken from the stream up to and with this step's; what was sampled for later steps lies beyond it."""
    metrics: Metrics = field(default_factory=dict)
    """Figures about the groups and what they cost."""
    provenance: Mapping[str, Any] | None = None
    """Where sampled groups came from, for the run's log; None for groups that the data gives as they are."""


class GroupSource(Protocol):
    """Supplies the groups of every step. Every worker calls each method, in the same order."""

    def seek(self, position: int, *, weight_version: int) -> None:
        """Goes on with the groups from `position` on, as the weights of that version would have."""

    def next_batch(self) -> StepBatch:
        """Returns the groups of the next step.

        Raises:
            RolloutError: completions could not be sampled.
            RewardError: completions could not be scored.
        """

    def publish(self, weight_version: int) -> Metrics:
        """Makes the actor's new weights those that later groups are sampled with; returns what that cost.

        Raises:
            RolloutError: an engine did not load them.
        """

    def clear(self) -> None:
        """Drops what was sampled ahead."""

    def state(self) -> dict[str, Tensor] | None:
        """Returns what was sampled ahead, for a checkpoint; None if there never is anything."""

    def restore(self, tensors: dict[str, Tensor]) -> bool:
        """Puts back what `state` has returned; returns false if the stream gives other prompts than those."""


class DataSource:
    """Groups as the data gives them: demonstrations, preference pairs, rankings."""

    def __init__(self, stream: GroupStream, *, groups_per_step: int) -> None:
        self.stream = stream
        self.groups_per_step = groups_per_step

    def seek(self, position: int, *, weight_version: int) -> None:
        """Moves the stream."""
        self.stream.position = position

    def next_batch(self) -> StepBatch:
        """Takes the next groups of the stream."""
        groups = self.stream.take(self.groups_per_step)
        return StepBatch(groups=groups, position=self.stream.position)

    def publish(self, weight_version: int) -> Metrics:
        """Does nothing: no group depends on the weights."""
        return {}

    def clear(self) -> None:
        """Does nothing: nothing is sampled ahead."""

    def state(self) -> None:
        """Returns None: the position is all that there is."""
        return None

    def restore(self, tensors: dict[str, Tensor]) -> bool:
        """Does nothing: the position has been restored already."""
        return True
