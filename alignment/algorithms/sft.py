"""Supervised fine-tuning: imitate the best completion of every group."""

from __future__ import annotations

import dataclasses
from typing import Literal

from alignment.algorithms import Algorithm
from alignment.errors import DataError
from alignment.types import Batch, Group, Loss, Outputs, Term


class SFT(Algorithm):
    """Maximum likelihood of the completions; from a preference pair only the better one is learned."""

    name: Literal["sft"] = "sft"
    """Supervised fine-tuning."""

    def select(self, group: Group) -> Group:
        if not group.completions:
            raise DataError("sft needs a completion to imitate; this row has only a prompt")
        best = max((c.reward for c in group.completions if c.reward is not None), default=None)
        return dataclasses.replace(group, completions=tuple(c for c in group.completions if c.reward == best))

    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        nll = Term(values=-outputs.logprobs[batch.learned], unit="token")
        return Loss(terms=(nll,), metrics={"nll": nll.values.detach()})


ALGORITHM = SFT
