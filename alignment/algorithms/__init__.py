"""Algorithms: how each uses a group, and its loss. A module has the name of its algorithm: `algorithm: {name: dpo}`."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any, ClassVar, Literal

from alignment.batch import Batch, Loss, Outputs
from alignment.errors import DataError, NoPreference
from alignment.groups import Group
from alignment.settings.plugins import AlgorithmConfig

logger = logging.getLogger(__name__)


OLD_ATTRIBUTES = {
    "samples": "is_online",
    "tempered": "uses_sampling_temperature",
    "needs_old": "needs_old_logprobs",
    "wants_entropy": "needs_entropy",
    "first_kl_coefficient": "init_kl_coef",
}
"""Attributes that algorithms of other packages may still define by the names of earlier releases."""


class Algorithm(AlgorithmConfig):
    """The hyperparameters of an algorithm, which never change, and pure methods.

    A new algorithm is one file in this folder with a subclass of this class, which `ALGORITHM` names, and one recipe.
    """

    uses_sampling_temperature: ClassVar[bool] = False
    """True if log-probabilities are computed at the sampling temperature."""
    needs_critic: ClassVar[bool] = False
    """True if the algorithm has a value model."""
    samples: ClassVar[bool]
    """The old name of `is_online`, for subclasses that define it."""
    tempered: ClassVar[bool]
    """The old name of `uses_sampling_temperature`, for subclasses that define it."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Gives a subclass that defines attributes by their old names the new ones too."""
        super().__pydantic_init_subclass__(**kwargs)
        for old, new in OLD_ATTRIBUTES.items():
            if old in vars(cls):
                logger.warning(
                    "%s.%s is called %s now; its old name works in this release only", cls.__name__, old, new
                )
                setattr(cls, new, vars(cls)[old])

    @property
    def epochs(self) -> int:
        """Number of passes over the groups of each step."""
        return 1

    @property
    def minibatches(self) -> int:
        """Number of optimizer steps in each of these passes; every one has other groups."""
        return 1

    @property
    def needs_old_logprobs(self) -> bool:
        """True if the loss needs log-probabilities under the actor from before the first update."""
        return False

    @property
    def needs_entropy(self) -> bool:
        """True if the loss needs the entropy of each token's distribution."""
        return False

    @property
    def loss_metrics(self) -> dict[str, str]:
        """Metrics of the losses that a configuration names, with their names: what is not finite is told by name."""
        return {}

    @abstractmethod
    def select(self, group: Group) -> Group:
        """Keeps the completions that this algorithm trains on.

        Raises:
            NoPreference: the group is valid, but it has no two completions to compare.
            DataError: the group has nothing for this algorithm; the text says what is missing.
        """

    def is_informative(self, group: Group) -> bool:
        """Whether a scored group of the model's own answers has a gradient. Others are replaced by new prompts."""
        return True

    def assemble(self, groups: list[Group]) -> list[Group]:
        """Sees the groups of a step before they are packed, and may add to them, as KTO does with mismatched answers.

        Every worker calls it with all of the step's groups, and must return the same ones.
        """
        return groups

    def prepare(self, batch: Batch) -> Batch:
        """Prepares the annotated global batch of a step before its first update; for example, computes advantages."""
        return batch

    @abstractmethod
    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        """The loss of one micro-batch: unreduced terms with their unit, and metrics."""

    def next_kl_coefficient(self, kl_coefficient: float, *, kl: float, num_completions: int) -> float:
        """The price of divergence in the next step.

        Args:
            kl_coefficient: the price in this step.
            kl: mean divergence from the reference in this step, in nats per completion.
            num_completions: number of completions that it was measured on.
        """
        return kl_coefficient

    def step_metrics(self, kl_coefficient: float) -> dict[str, float]:
        """Settings of this algorithm that change from step to step, to be reported with the measured metrics."""
        return {"kl_coefficient": kl_coefficient} if self.is_online else {}

    @property
    def init_kl_coef(self) -> float:
        """The price of divergence in the first step."""
        return 0.0


class ReferencedAlgorithm(Algorithm):
    """An algorithm whose loss compares the actor with a reference: the frozen model that training started from."""

    reference: Literal["auto", "adapter_off", "copy", "precomputed"] = "auto"
    """Where log π_ref comes from. `adapter_off`: the same weights without the adapter (LoRA only). `copy`: a frozen
    copy of the starting model. `precomputed`: log-probabilities of all groups are computed before the first step and
    stored in the run's folder, so that no second model stays in memory; without LoRA, there is then no KL of answers
    that are sampled later. `auto` is `adapter_off` with LoRA, else `copy`."""


def check_preference(algorithm: str, group: Group) -> None:
    """Checks that a group has two answers with different rewards.

    Raises:
        NoPreference: all answers have the same reward.
        DataError: there are no answers, or some have no reward.
    """
    if group.pairs:
        return
    rewards = [completion.reward for completion in group.completions]
    is_tie = rewards and None not in rewards
    kind = NoPreference if is_tie else DataError
    raise kind(f"{algorithm} needs two completions with different rewards; this row's rewards are {rewards}")
