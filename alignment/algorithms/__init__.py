"""Algorithms: what each needs of a group, and its loss. The module's name is the registry: `algorithm: {name: dpo}`."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from alignment.batch import Batch, Loss, Outputs
from alignment.errors import DataError, NoPreference
from alignment.groups import Group
from alignment.settings.plugins import AlgorithmConfig


class Algorithm(AlgorithmConfig):
    """A frozen set of hyper-parameters, and pure methods.

    A new algorithm is one file in this folder with a subclass of this, named by `ALGORITHM`, and one recipe.
    """

    tempered: ClassVar[bool] = False
    """True if log-probabilities are those at the sampling temperature."""
    needs_critic: ClassVar[bool] = False
    """True if it has a value model."""

    @property
    def epochs(self) -> int:
        """How often each step's groups are learned from."""
        return 1

    @property
    def minibatches(self) -> int:
        """Optimizer steps that each of those epochs is cut into, by groups."""
        return 1

    @property
    def needs_old(self) -> bool:
        """True if log-probabilities under the actor are wanted before the first update."""
        return False

    @property
    def wants_entropy(self) -> bool:
        """True if the entropy of every distribution is wanted."""
        return False

    @abstractmethod
    def select(self, group: Group) -> Group:
        """Keeps the completions that this algorithm learns from.

        Raises:
            NoPreference: the group is in order, and this algorithm has nothing to compare in it.
            DataError: the group has nothing for this algorithm; the text says what is missing.
        """

    def is_informative(self, group: Group) -> bool:
        """Whether a scored group of the model's own answers teaches anything; others are replaced by new prompts."""
        return True

    def prepare(self, batch: Batch) -> Batch:
        """Sees the whole global batch of a step, annotated, before the first update: rewards become advantages."""
        return batch

    @abstractmethod
    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        """Loss of one micro-batch: unreduced terms with their unit, and metrics."""

    def next_kl_coefficient(self, now: float, *, kl: float, completions: int) -> float:
        """The price of divergence in the next step, from what was measured in this one.

        Args:
            now: the price in this step.
            kl: mean divergence from the reference, in nats per completion.
            completions: how many it was measured on.
        """
        return now

    def step_metrics(self, kl_coefficient: float) -> dict[str, float]:
        """Settings of this algorithm that change from step to step, to be reported beside what was measured."""
        return {"kl_coefficient": kl_coefficient} if self.samples else {}

    @property
    def first_kl_coefficient(self) -> float:
        """The price of divergence in the first step."""
        return 0.0


class ReferencedAlgorithm(Algorithm):
    """An algorithm whose loss compares the actor with the frozen model that training started from."""

    reference: Literal["auto", "adapter_off", "copy", "precomputed"] = "auto"
    """Where log π_ref comes from. `adapter_off`: the same weights without the adapter (LoRA only). `copy`: a frozen
    copy of the starting model. `precomputed`: log-probabilities of all groups are computed before the first step and
    kept beside the run, so that no second model stays in memory; without LoRA there is then no KL of answers that are
    drawn later. `auto` is `adapter_off` with LoRA, else `copy`."""


def check_preference(algorithm: str, group: Group) -> None:
    """Checks that an algorithm which compares answers has two to compare.

    Raises:
        NoPreference: all answers are rated, and none higher than another.
        DataError: there are no answers, or unrated ones.
    """
    if group.pairs:
        return
    rewards = [completion.reward for completion in group.completions]
    undecided = rewards and None not in rewards
    kind = NoPreference if undecided else DataError
    raise kind(f"{algorithm} needs two completions with different rewards; this row's rewards are {rewards}")
