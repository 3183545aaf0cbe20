"""Rewards: what a completion is worth. The port for scorers, and the one way from a configuration to them."""

from __future__ import annotations

from typing import Protocol

import torch

from alignment.config import ScorerConfig
from alignment.types import Group


class Scorer(Protocol):
    """Gives rewards to completions."""

    def score(self, groups: list[Group]) -> list[list[float]]:
        """One reward for each completion of each group; higher is better.

        Raises:
            RewardError: a reward is missing or not a number, and trying again did not help.
        """

    def close(self) -> None:
        """Frees what it holds."""


class BuildableScorer(ScorerConfig):
    """The configuration of a scorer, which can make it."""

    def build(self, device: torch.device) -> Scorer:
        """Makes the scorer; called once in every training worker.

        Raises:
            AlignmentError: what it needs is not there.
        """
        raise NotImplementedError


def scorer_class(name: str) -> type[BuildableScorer]:
    """Finds the class behind a scorer's name.

    Raises:
        ConfigError: there is none.
    """
    raise NotImplementedError(name)
