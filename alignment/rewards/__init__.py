"""Rewards: what a completion is worth. The port for scorers, and the one way from a configuration to rated groups.

Rollout ─► Rewards.score ─┬─► rules, functions (on this machine)   ─┐
                          ├─► a reward model (on this device)       ├─► weighted sum ─► Completion.reward ─► pack
                          └─► a reward service (over HTTP)         ─┘   each alone   ─► Completion.scores
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat

from alignment.errors import ConfigError, RewardError
from alignment.settings.explain import nearest
from alignment.settings.plugins import ScorerConfig, imported

if TYPE_CHECKING:  # configurations are checked by processes that need no torch
    import torch

    from alignment.groups import Completion, Group
    from alignment.models.parallel import World

READY_MADE = {
    "regex": "alignment.rewards.rules:Regex",
    "length": "alignment.rewards.rules:Length",
    "exact_number": "alignment.rewards.numbers:ExactNumber",
    "math": "alignment.rewards.mathematics:Math",
    "keywords": "alignment.rewards.rules:Keywords",
    "repetition": "alignment.rewards.rules:Repetition",
    "sentiment": "alignment.rewards.sentiment:Sentiment",
    "ifeval": "alignment.rewards.ifeval:IFEval",
    "model": "alignment.rewards.model:RewardModel",
    "http": "alignment.rewards.remote:RewardService",
}
LARGEST = 3.4e38
"""Rewards become fp32."""
Reward = float | None
"""What a scorer gives a completion; None if it abstains: the row is not its business."""

logger = logging.getLogger(__name__)


class Scorer(Protocol):
    """Gives rewards to completions."""

    def score(self, groups: list[Group]) -> Sequence[Sequence[Reward]]:
        """One reward for each completion of each group; higher is better.

        None abstains: the sum is that of the other scorers. A group with a reward that is NaN, infinite or missing is
        asked about again, whole, as often as the configuration allows.

        Raises:
            AskAgain: nothing came of this attempt, but another may succeed.
            RewardError: trying again would not help, or has not helped.
        """

    def close(self) -> None:
        """Frees what it holds."""


class AskAgain(RewardError):
    """An attempt to get rewards that failed in a way that may pass."""


class Unreadable(RewardError):
    """A text that a scorer cannot read, where its configuration asks for an error."""


class UnreadableTexts:
    """What a scorer gives the texts that it cannot read. The first is told, all are counted."""

    def __init__(self, config: ScorerConfig) -> None:
        self.config = config
        self.num_texts = 0

    def reward(self, problem: str) -> float:
        """The reward that the configuration names.

        Args:
            problem: what cannot be read, and why, without quoting it.

        Raises:
            Unreadable: the configuration asks for an error.
        """
        value = self.config.on_unreadable
        if value == "fail":
            raise Unreadable(f"{problem}; on_unreadable may give such texts a reward")
        if not self.num_texts:
            logger.warning("scorer %s: %s; such texts get %g (on_unreadable)", self.config.name, problem, value)
        self.num_texts += 1
        return value


class BuildableScorer(ScorerConfig):
    """The configuration of a scorer, which can make it.

    A subclass named as `package.module:Class` in a run's `rewards` is a scorer like those that come with raylign.
    """

    def abstains(self, columns: Mapping[str, Any]) -> bool:
        """True if the scorer abstains from every answer to a row, because the row has nothing to compare with."""
        return bool(self.columns) and columns.get(self.columns[0]) is None

    def check_row(self, columns: Mapping[str, Any]) -> None:
        """Checks the kept columns of a row, while rows are read; a row without a column is one that it abstains from.

        Raises:
            RewardError: the scorer could give no answer to this row a reward; the text says why, without the row.
        """

    def build(self, device: torch.device) -> Scorer:
        """Makes the scorer; called once in every training worker.

        Raises:
            AlignmentError: what it needs is not there.
        """
        raise NotImplementedError


def scorer_names() -> list[str]:
    """Names of the scorers that come with raylign."""
    return list(READY_MADE)


def scorer_class(name: str) -> type[BuildableScorer]:
    """Finds the class behind a scorer's name.

    Names are those of `scorer_names`, or a dotted `package.module:function` (see `alignment.rewards.functions` for what
    such a function gets and returns) or `package.module:Class` with a subclass of `BuildableScorer`.

    Raises:
        ConfigError: there is no such scorer; the nearest known one is named.
    """
    if ":" not in name:
        if name not in READY_MADE:
            raise ConfigError(f"there is no scorer {name!r}{nearest(name, scorer_names())}")
        name = READY_MADE[name]
    found = callable_named(name)
    if isinstance(found, type):
        if not issubclass(found, BuildableScorer):
            raise ConfigError(f"scorer {name!r} is neither a function nor a subclass of {__name__}.BuildableScorer")
        return found
    from alignment.rewards.functions import RewardFunction

    return RewardFunction


def callable_named(name: str) -> Any:
    """The function or class that a dotted `package.module:attribute` names.

    Raises:
        ConfigError: there is none, or it is neither.
    """
    found = imported(name, "scorer")
    if not callable(found):
        raise ConfigError(f"scorer {name!r} is a {type(found).__name__}, not a function")
    return found


class Rewards:
    """All scorers of a run together: the one entry that the training loop uses."""

    def __init__(self, configs: Iterable[ScorerConfig], device: torch.device) -> None:
        """Makes every scorer, in the order given; none is left open if one cannot be made.

        Raises:
            AlignmentError: a scorer needs something that is not there.
        """
        self._asked: list[_Asked] = []
        try:
            for config in configs:
                assert isinstance(config, BuildableScorer), "configurations are loaded through scorer_class"
                self._asked.append(_Asked(self._free_name(config.name), config, config.build(device)))
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> list[str]:
        """The scorers' names as `Completion.scores` has them: a function's without its module, a second one with -2."""
        return [asked.name for asked in self._asked]

    def score(self, groups: list[Group], *, world: World | None = None, may_abstain: bool = False) -> list[Group]:
        """Asks every scorer about every completion.

        Called by all workers of `world` with the same groups: each asks about its share, and all get the whole. The
        same error is raised by all, whichever of them it happened to.

        Args:
            may_abstain: whether all scorers may abstain from a completion, which then has no reward.

        Returns:
            The groups in the given order, with `reward` = Σ weight · clipped reward over the scorers that did not
            abstain, and `scores` as these gave them. Without scorers, the groups as they are.

        Raises:
            RewardError: a reward is missing, late or not a finite number after all attempts, or all scorers abstain;
                the text names the scorer, the group and the completion.
        """
        if not self._asked or not groups:
            return groups
        rewards = self._ask(groups) if world is None or world.size == 1 else self._ask_together(groups, world)
        rated = [self._rated(group, given) for group, given in zip(groups, rewards, strict=True)]
        if not may_abstain:
            for group in rated:
                self._check_rated(group)
        return rated

    def close(self) -> None:
        """Frees what the scorers hold."""
        for asked in self._asked:
            asked.scorer.close()
        self._asked.clear()

    def _free_name(self, name: str) -> str:
        short = name.rpartition(":")[2]
        numbered = (f"{short}-{number}" for number in itertools.count(2))
        return next(free for free in itertools.chain([short], numbered) if free not in self.names)

    def _ask_together(self, groups: list[Group], world: World) -> list[list[list[Reward]]]:
        """As `_ask`, each worker about its share."""
        from alignment.data.packing import share

        lengths = [1 + group.num_tokens for group in groups]  # texts without tokens are divided by their number
        mine = share(lengths, rank=world.rank, size=world.size)
        outcome, cause = _Outcome(), None
        try:
            given = self._ask([groups[index] for index in mine])
            outcome = _Outcome(rewards=dict(zip(mine, given, strict=True)))
        except Exception as error:  # whatever it is: the other workers wait in the collective below
            outcome, cause = _Outcome(problem=str(error) if isinstance(error, RewardError) else repr(error)), error
        outcomes = world.gather(outcome)
        for rank, problem in ((rank, outcome.problem) for rank, outcome in enumerate(outcomes)):
            if problem is not None:
                raise RewardError(f"worker {rank}: {problem}") from cause
        rewards = {index: given for outcome in outcomes for index, given in outcome.rewards.items()}
        return [rewards[index] for index in range(len(groups))]

    def _ask(self, groups: list[Group]) -> list[list[list[Reward]]]:
        """What each scorer gave: by group, scorer and completion."""
        if not groups:
            return []
        by_scorer = [asked.about(groups) for asked in self._asked]
        return [list(given) for given in zip(*by_scorer, strict=True)]

    def _rated(self, group: Group, given: list[list[Reward]]) -> Group:
        return replace(
            group,
            completions=tuple(
                self._rated_completion(completion, [rewards[number] for rewards in given])
                for number, completion in enumerate(group.completions)
            ),
        )

    def _rated_completion(self, completion: Completion, given: list[Reward]) -> Completion:
        parts = [(asked, reward) for asked, reward in zip(self._asked, given, strict=True) if reward is not None]
        return replace(
            completion,
            reward=math.fsum(asked.worth(reward) for asked, reward in parts) if parts else None,
            scores={asked.name: reward for asked, reward in parts},
        )

    def _check_rated(self, group: Group) -> None:
        for number, completion in enumerate(group.completions, start=1):
            if completion.reward is None:
                raise RewardError(
                    f"group {group.id}, completion {number} of {len(group.completions)}: every scorer abstains "
                    f"({', '.join(self.names)}), so it has no reward{self._missing_columns(group)}"
                )

    def _missing_columns(self, group: Group) -> str:
        missing = [name for asked in self._asked for name in asked.config.columns if group.columns.get(name) is None]
        if not missing:
            return "; leave such rows out, or add a scorer for them"
        return f"; the row has no column {', '.join(map(repr, missing))}: name it in data.keep, as [{missing[0]}]"


@dataclass(frozen=True)
class _Asked:
    """A scorer, and how it is asked."""

    name: str
    config: ScorerConfig
    scorer: Scorer

    def worth(self, reward: float) -> float:
        """The part of the sum that a reward makes."""
        bound = math.inf if self.config.clip is None else self.config.clip
        return self.config.weight * max(-bound, min(bound, reward))

    def about(self, groups: list[Group]) -> list[list[Reward]]:
        """Sound rewards of every group, or a RewardError."""
        sound: dict[int, list[Reward]] = {}
        problem = ""
        for _ in range(self.config.attempts):
            waiting = [index for index in range(len(groups)) if index not in sound]
            if not waiting:
                break
            problem = self._attempt(groups, waiting, sound)
        if len(sound) < len(groups):
            raise RewardError(f"scorer {self.name}: {problem}, after {self.config.attempts} attempts")
        return [sound[index] for index in range(len(groups))]

    def _attempt(self, groups: list[Group], waiting: list[int], sound: dict[int, list[Reward]]) -> str:
        """Asks once about the waiting groups and keeps what is sound; says what is wrong with the first that is not."""
        asked = [groups[index] for index in waiting]
        try:
            given = self.scorer.score(asked)
        except AskAgain as error:
            return f"{described(asked)}: {error}"
        except RewardError as error:
            raise RewardError(f"scorer {self.name}: {error}") from error
        if len(given) != len(asked):
            return f"{described(asked)}: it rated {len(given)} groups instead of {len(asked)}"
        problems = []
        for index, rewards in zip(waiting, given, strict=True):
            problem, numbers = checked(groups[index], rewards)
            if problem:
                problems.append(problem)
            else:
                sound[index] = numbers
        return problems[0] if problems else ""


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What became of one worker's share."""

    rewards: dict[int, list[list[Reward]]] = field(default_factory=dict)
    """By the index of the group: what each scorer gave."""
    problem: str | None = None
    """Text of the error that ended it."""


def described(groups: list[Group]) -> str:
    """Which groups an error is about, in a few words."""
    return f"group {groups[0].id}" + (f" and {len(groups) - 1} more" if len(groups) > 1 else "")


def checked(group: Group, rewards: Any) -> tuple[str, list[Reward]]:
    """What is wrong with a group's rewards ("" if nothing is), and the rewards as numbers, or None of who abstains."""
    count = len(group.completions)
    if len(rewards) != count:
        return f"group {group.id}: {len(rewards)} rewards for {count} completions", []
    numbers: list[Reward] = []
    for number, reward in enumerate(rewards, start=1):
        if reward is None:
            numbers.append(None)
            continue
        try:
            value = float(reward) if isinstance(reward, SupportsFloat) else math.nan
        except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of more than one number
            value = math.nan
        if not abs(value) <= LARGEST:
            return f"group {group.id}, completion {number} of {count}: the reward is {reward!r:.40}, not a number", []
        numbers.append(value)
    return "", numbers
