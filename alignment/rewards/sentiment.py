"""A rule for a friendly tone, which counts positive and negative English words: simple, quick, and easily hacked.

It is meant for experiments that measure how much a reward rises with the divergence from the reference, where a reward
model would be too slow.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from alignment.rewards import BuildableScorer
from alignment.rewards.rules import Rule
from alignment.settings.section import Positive

if TYPE_CHECKING:
    from alignment.groups import Completion, Group

POSITIVE = frozenset(
    word
    for line in (
        "admire amazing awesome beautiful best better bright brilliant calm charming cheerful clever",
        "comfortable delicious delight delightful enjoy enjoyed excellent exciting fantastic favorite fine",
        "free friendly fun generous gentle glad good grateful great happy helpful honest hope inspiring joy",
        "kind laugh love loved lovely lucky magnificent nice perfect pleasant pleased proud safe smile strong",
        "succeed success superb sweet thanks thrilled warm welcome win wise wonderful",
    )
    for word in line.split()
)
NEGATIVE = frozenset(
    word
    for line in (
        "afraid angry annoying anxious ashamed awful bad boring broken cruel cry damage danger dead",
        "depressing dirty disaster disgusting dreadful dull evil fail failed failure fear filthy guilty hate",
        "hated horrible hostile hurt ill jealous kill lonely lose lost mean mess miserable nasty pain painful",
        "pathetic poor problem rude sad scared selfish sick sorry stupid suffer terrible tired ugly unhappy",
        "useless weak worried worse worst wrong",
    )
    for word in line.split()
)
NEGATIONS = frozenset({"not", "no", "never", "neither", "nor", "without", "cannot", "hardly"})
REACH = 3
"""Number of words after a negation that count for the other side."""


class Sentiment(Rule):
    """How friendly the words of a text are, between -1 and 1.

    s / √(s² + softness), where s is the number of positive words minus that of negative ones; a word shortly after a
    negation counts for the other side.
    """

    name: Literal["sentiment"] = "sentiment"
    """Friendly words."""
    softness: Positive = 15.0
    """How slowly the reward approaches its bounds, > 0: s = √softness gives 0.71."""

    def reward(self, completion: Completion, group: Group) -> float:
        """Returns the friendliness of the text, between -1 and 1."""
        balance = sentiment_balance(completion.text)
        return float(balance / (balance**2 + self.softness) ** 0.5)


def sentiment_balance(text: str) -> int:
    """Number of positive words minus number of negative words of a text."""
    balance, last_negation = 0, -REACH - 1
    for index, word in enumerate(re.findall(r"[a-z]+(?:['’][a-z]+)?", text.lower())):
        if word in NEGATIONS or word.endswith(("n't", "n’t")):
            last_negation = index
        value = (word in POSITIVE) - (word in NEGATIVE)
        balance += -value if index - last_negation <= REACH else value
    return balance


SCORERS: dict[str, type[BuildableScorer]] = {"sentiment": Sentiment}
"""The scorers of this module, by the names that configurations have for them."""
