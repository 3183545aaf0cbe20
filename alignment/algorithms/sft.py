"""Supervised fine-tuning on demonstrations, and on the good ones among rated completions."""

from __future__ import annotations

import dataclasses
from typing import Literal

from alignment.algorithms import Algorithm
from alignment.batch import Batch, Loss, Outputs, Term
from alignment.errors import DataError, NothingToImitate
from alignment.groups import Group

GOOD = 0.5
"""A rating above this is good if no answer has a lower one: thumbs and labels are 1 or 0, a tie is 0.5."""


class SFT(Algorithm):
    """Maximises the likelihood of completions that are good examples.

    1. Completions without a rating are demonstrations, and all of them are trained on.
    2. If ratings differ, as in a pair, a ranking or a correction, only the best completions are trained on.
    3. If ratings are equal, as with a thumb, a label or a tie, the completions are trained on if the rating is above
       0.5. A thumb up, `label: true` and "both good" are; a thumb down, `label: false`, "both bad" and a tie of 0.5 are
       not.

    Rows without a completion to train on are left out and counted.
    """

    name: Literal["sft"] = "sft"
    """Supervised fine-tuning."""

    def select(self, group: Group) -> Group:
        """Keeps the completions to train on."""
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
        """The negative log-likelihood of each token."""
        nll = Term(values=-outputs.logprobs[batch.loss_mask], unit="token")
        return Loss(terms=(nll,), metrics={"nll": nll.values.detach()})


ALGORITHM = SFT
