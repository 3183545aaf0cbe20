"""Supervised fine-tuning: imitate what nobody has rated, and of what was rated only the good."""

from __future__ import annotations

import dataclasses
from typing import Literal

from alignment.algorithms import Algorithm
from alignment.batch import Batch, Loss, Outputs, Term
from alignment.errors import DataError, NothingToImitate
from alignment.groups import Group

GOOD = 0.5
"""A rating above it is good where no answer is worse: thumbs and labels are 1 or 0, a tie is 0.5."""


class SFT(Algorithm):
    """Maximum likelihood of the completions that are worth imitating.

    1. Completions that nobody has rated are demonstrations: all are imitated.
    2. Where ratings differ, as in a pair, a ranking or a correction, the best are imitated and the others never.
    3. Where they do not, as with a thumb, a label or a tie, they are imitated if the rating is above 0.5: a thumb up,
       `label: true` and "both good" are, a thumb down, `label: false`, "both bad" and a tie of 0.5 are not.

    Rows of which nothing is left are left out and counted.
    """

    name: Literal["sft"] = "sft"
    """Supervised fine-tuning."""

    def select(self, group: Group) -> Group:
        if not group.completions:
            raise DataError("sft needs a completion to imitate; this row has only a prompt")
        rewards = [completion.reward for completion in group.completions if completion.reward is not None]
        if not rewards:
            return group
        best = max(rewards)
        if best == min(rewards) and best <= GOOD:
            raise NothingToImitate(f"sft imitates what is rated above {GOOD:g}; this row's ratings are {rewards}")
        return dataclasses.replace(group, completions=tuple(c for c in group.completions if c.reward == best))

    def loss(self, batch: Batch, outputs: Outputs) -> Loss:
        nll = Term(values=-outputs.logprobs[batch.learned], unit="token")
        return Loss(terms=(nll,), metrics={"nll": nll.values.detach()})


ALGORITHM = SFT
