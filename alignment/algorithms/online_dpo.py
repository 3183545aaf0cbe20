"""Online DPO (arXiv 2402.04792): the pairs are the model's own answers, which the run's scorers rate."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from alignment.algorithms.dpo import DPO
from alignment.batch import Batch, Loss, Outputs
from alignment.errors import DataError
from alignment.groups import Group


class OnlineDPO(DPO):
    """DPO on each two completions of a prompt with different rewards."""

    is_online: ClassVar[bool] = True
    min_completions: ClassVar[int] = 2

    name: Literal["online_dpo"] = "online_dpo"  # type: ignore[assignment]
    """DPO on the model's own answers."""
    reference: Literal["auto", "adapter_off", "copy"] = "auto"
    """Where log π_ref comes from: `adapter_off` (LoRA only) or a frozen `copy`; `auto` is the former with LoRA."""

    def select(self, group: Group) -> Group:
        """Keeps the prompt alone, because the answers are sampled."""
        if not group.prompt:
            raise DataError("online_dpo needs a prompt to answer; this row has none")
        return dataclasses.replace(group, completions=())

    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        """The preference loss of each pair; it also reports the divergence from the reference."""
        assert batch.reference_logprobs is not None, "the loop annotates the batches of a ReferencedAlgorithm"
        loss = super().loss(batch, outputs)
        kl = batch.per_completion(outputs.logprobs.detach() - batch.reference_logprobs)
        return dataclasses.replace(loss, metrics=loss.metrics | {"kl": kl})

    def is_informative(self, group: Group) -> bool:
        """True if two completions have different rewards."""
        return bool(group.pairs)


ALGORITHM = OnlineDPO
