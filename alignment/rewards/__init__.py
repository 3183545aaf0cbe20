"""Rewards of completions: the port for scorers, and the one way from a configuration to rated groups.

Rollout ─► Rewards.score ─┬─► rules, functions (on this machine)   ─┐
                          ├─► a reward model (on this device)       ├─► weighted sum ─► Completion.reward ─► pack
                          └─► a reward service (over HTTP)         ─┘   each alone   ─► Completion.scores
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat

from alignment.errors import RewardError
from alignment.settings.plugins import ScorerConfig
from alignment.settings.section import MAX_REWARD

if TYPE_CHECKING:  # configurations are checked by processes that need no torch
    import torch

    from alignment.distributed.world import World
    from alignment.groups import Completion, Group

Reward = float | None
"""The reward that a scorer gives a completion; None if it abstains, because it does not rate rows of this kind."""

logger = logging.getLogger(__name__)


class Scorer(Protocol):
    """Gives rewards to completions."""

    def score(self, groups: list[Group]) -> Sequence[Sequence[Reward]]:
        """Returns one reward for each completion of each group; higher is better.

        With None the scorer abstains: the completion's reward is the sum over the other scorers. If a reward is NaN,
        infinite or missing, the whole group is scored again, as often as the configuration allows.

        Raises:
            AskAgain: this attempt failed, and another one may succeed.
            RewardError: another attempt would not help.
        """

    def close(self) -> None:
        """Frees the resources of the scorer."""


class AskAgain(RewardError):
    """An attempt to get rewards failed for a reason that may pass, so that another attempt makes sense."""


class Unreadable(RewardError):
    """A scorer cannot read a text, and its configuration asks for an error then."""


class UnreadableTexts:
    """The reward of texts that a scorer cannot read. The first such text is logged, and all are counted."""

    def __init__(self, config: ScorerConfig) -> None:
        self.config = config
        self.num_texts = 0
        """Number of unreadable texts so far."""

    def reward(self, problem: str) -> float:
        """Returns the reward that the configuration gives to an unreadable text.

        Args:
            problem: says which text cannot be read, and why, without quoting it.

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
    """The configuration of a scorer, which can build the scorer.

    A user's subclass, named as `package.module:Class` in a run's `rewards`, is a scorer like the built-in ones.
    """

    def abstains(self, columns: Mapping[str, Any]) -> bool:
        """True if the scorer abstains from every answer to a row, because the row lacks the column to compare with."""
        return bool(self.columns) and columns.get(self.columns[0]) is None

    def check_row(self, columns: Mapping[str, Any]) -> None:
        """Checks the kept columns of a row while rows are read. The scorer abstains from a row without its column.

        Raises:
            RewardError: the scorer could not rate any answer to this row; the text says why, without naming the row.
        """

    def build(self, device: torch.device) -> Scorer:
        """Builds the scorer. It is called once in every training worker.

        Raises:
            AlignmentError: something that the scorer needs is missing.
        """
        raise NotImplementedError


class Rewards:
    """All scorers of a run; the training loop uses this class alone."""

    def __init__(self, configs: Iterable[ScorerConfig], device: torch.device) -> None:
        """Builds every scorer, in the given order; if one cannot be built, the others are closed.

        Raises:
            AlignmentError: something that a scorer needs is missing.
        """
        self._entries: list[_ConfiguredScorer] = []
        try:
            for config in configs:
                assert isinstance(config, BuildableScorer), "configurations are loaded through scorer_class"
                self._entries.append(_ConfiguredScorer(self._unused_name(config.name), config, config.build(device)))
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> list[str]:
        """Names of the scorers in `Completion.scores`: functions without their module, an equal second name with -2."""
        return [entry.name for entry in self._entries]

    def score(self, groups: list[Group], *, world: World | None = None, may_abstain: bool = False) -> list[Group]:
        """Rates every completion by every scorer.

        All workers of `world` must call this with the same groups. Each worker scores its share, and all get the
        rewards of all groups. If one worker has an error, all workers raise it.

        Args:
            may_abstain: whether all scorers may abstain from a completion, which then has no reward.

        Returns:
            The groups in the given order, with `reward` = Σ weight · clipped reward over the scorers that did not
            abstain, plus what an environment gave, and with the unweighted rewards in `scores`. Without scorers, the
            groups are unchanged.

        Raises:
            RewardError: after all attempts, a reward is missing, late or not a finite number; or all scorers abstain,
                or the sum is too large for fp32. The text names the scorer, the group and the completion.
        """
        if not self._entries or not groups:
            return groups
        rewards = self._score_groups(groups) if world is None or world.size == 1 else self._score_shares(groups, world)
        rated_groups = [
            self._attach_rewards(group, group_rewards) for group, group_rewards in zip(groups, rewards, strict=True)
        ]
        for group in rated_groups:
            self._check_rewards(group, may_abstain=may_abstain)
        return rated_groups

    def close(self) -> None:
        """Closes all scorers."""
        for entry in self._entries:
            entry.scorer.close()
        self._entries.clear()

    def _unused_name(self, name: str) -> str:
        short_name = name.rpartition(":")[2]
        numbered_names = (f"{short_name}-{number}" for number in itertools.count(2))
        return next(
            candidate for candidate in itertools.chain([short_name], numbered_names) if candidate not in self.names
        )

    def _score_shares(self, groups: list[Group], world: World) -> list[list[list[Reward]]]:
        """As `_score_groups`, divided between the workers: each scores its share."""
        from alignment.data.packing import share

        lengths = [1 + group.num_tokens for group in groups]  # groups without tokens are divided by their number
        indices = share(lengths, rank=world.rank, size=world.size)
        result, cause = _WorkerRewards(), None
        try:
            group_rewards = self._score_groups([groups[index] for index in indices])
            result = _WorkerRewards(rewards=dict(zip(indices, group_rewards, strict=True)))
        except Exception as error:  # any error: the other workers wait in the collective below
            result, cause = _WorkerRewards(problem=str(error) if isinstance(error, RewardError) else repr(error)), error
        results = world.gather(result)
        for rank, problem in ((rank, result.problem) for rank, result in enumerate(results)):
            if problem is not None:
                raise RewardError(f"worker {rank}: {problem}") from cause
        rewards = {index: group_rewards for result in results for index, group_rewards in result.rewards.items()}
        return [rewards[index] for index in range(len(groups))]

    def _score_groups(self, groups: list[Group]) -> list[list[list[Reward]]]:
        """The reward of each scorer, by group, scorer and completion."""
        if not groups:
            return []
        rewards_by_scorer = [entry.score_groups(groups) for entry in self._entries]
        return [list(group_rewards) for group_rewards in zip(*rewards_by_scorer, strict=True)]

    def _attach_rewards(self, group: Group, rewards_by_scorer: list[list[Reward]]) -> Group:
        return replace(
            group,
            completions=tuple(
                self._attach_completion_rewards(completion, [rewards[number] for rewards in rewards_by_scorer])
                for number, completion in enumerate(group.completions)
            ),
        )

    def _attach_completion_rewards(self, completion: Completion, rewards: list[Reward]) -> Completion:
        scored_rewards = [
            (entry, reward) for entry, reward in zip(self._entries, rewards, strict=True) if reward is not None
        ]
        summands = [entry.weigh(reward) for entry, reward in scored_rewards]
        if completion.environment_reward is not None:
            summands.append(completion.environment_reward)
        return replace(
            completion,
            reward=math.fsum(summands) if summands else None,
            scores={entry.name: reward for entry, reward in scored_rewards},
        )

    def _check_rewards(self, group: Group, *, may_abstain: bool) -> None:
        for number, completion in enumerate(group.completions, start=1):
            location = f"group {group.id}, completion {number} of {len(group.completions)}"
            if completion.reward is None and not may_abstain:
                raise RewardError(
                    f"{location}: every scorer abstains ({', '.join(self.names)}), so it has no reward"
                    f"{self._missing_columns(group)}"
                )
            if completion.reward is not None and not abs(completion.reward) <= MAX_REWARD:
                raise RewardError(
                    f"{location}: the weighted sum of its rewards is {completion.reward:g}, and fp32 ends at "
                    f"{MAX_REWARD:g}; lower the weights, or clip the rewards ({', '.join(self.names)})"
                )

    def _missing_columns(self, group: Group) -> str:
        column_names = [
            name for entry in self._entries for name in entry.config.columns if group.columns.get(name) is None
        ]
        if not column_names:
            return "; leave such rows out, or add a scorer for them"
        names = ", ".join(map(repr, column_names))
        return f"; the row has no column {names}: name it in data.keep, as [{column_names[0]}]"


@dataclass(frozen=True)
class _ConfiguredScorer:
    """A scorer with its name and its configuration."""

    name: str
    config: ScorerConfig
    scorer: Scorer

    def weigh(self, reward: float) -> float:
        """The reward after clipping and weighting, as it is added to the sum."""
        limit = math.inf if self.config.clip is None else self.config.clip
        return self.config.weight * max(-limit, min(limit, reward))

    def score_groups(self, groups: list[Group]) -> list[list[Reward]]:
        """The valid rewards of every group, after as many attempts as the configuration allows.

        Raises:
            RewardError: a group has no valid rewards after all attempts.
        """
        valid_rewards: dict[int, list[Reward]] = {}
        problem = ""
        for _ in range(self.config.attempts):
            pending_indices = [index for index in range(len(groups)) if index not in valid_rewards]
            if not pending_indices:
                break
            problem = self._attempt(groups, pending_indices, valid_rewards)
        if len(valid_rewards) < len(groups):
            raise RewardError(f"scorer {self.name}: {problem}, after {self.config.attempts} attempts")
        return [valid_rewards[index] for index in range(len(groups))]

    def _attempt(self, groups: list[Group], pending_indices: list[int], valid_rewards: dict[int, list[Reward]]) -> str:
        """Scores the pending groups once and stores the valid rewards; returns the first problem, or an empty text."""
        pending_groups = [groups[index] for index in pending_indices]
        try:
            group_rewards = self.scorer.score(pending_groups)
        except AskAgain as error:
            return f"{describe_groups(pending_groups)}: {error}"
        except RewardError as error:
            raise RewardError(f"scorer {self.name}: {error}") from error
        num_groups = num_values(group_rewards)
        if num_groups is None:
            return f"{describe_groups(pending_groups)}: it returned {not_a_list(group_rewards, 'lists of numbers')}"
        if num_groups != len(pending_groups):
            count = f"{num_groups} groups instead of {len(pending_groups)}"
            return f"{describe_groups(pending_groups)}: it rated {count}"
        problems = []
        for index, rewards in zip(pending_indices, group_rewards, strict=True):
            problem, numbers = check_rewards(groups[index], rewards)
            if problem:
                problems.append(problem)
            else:
                valid_rewards[index] = numbers
        return problems[0] if problems else ""


@dataclass(frozen=True, kw_only=True)
class _WorkerRewards:
    """The rewards of one worker's share of the groups, or the error that it raised."""

    rewards: dict[int, list[list[Reward]]] = field(default_factory=dict)
    """By the index of the group: the rewards of each scorer."""
    problem: str | None = None
    """Text of the error; None if there was none."""


def describe_groups(groups: list[Group]) -> str:
    """The groups of an error, in a few words: the first one and the number of the others."""
    return f"group {groups[0].id}" + (f" and {len(groups) - 1} more" if len(groups) > 1 else "")


def check_rewards(group: Group, rewards: Any) -> tuple[str, list[Reward]]:
    """Checks the rewards of a group; returns the problem ("" if there is none), and the rewards as numbers or None."""
    num_completions, num_rewards = len(group.completions), num_values(rewards)
    if num_rewards is None:
        return f"group {group.id}: its rewards are {not_a_list(rewards, 'numbers')}", []
    if num_rewards != num_completions:
        return f"group {group.id}: {num_rewards} rewards for {num_completions} completions", []
    numbers: list[Reward] = []
    for number, reward in enumerate(rewards, start=1):
        value = None if reward is None else to_number(reward)
        if reward is not None and (value is None or not abs(value) <= MAX_REWARD):
            location = f"group {group.id}, completion {number} of {num_completions}"
            return f"{location}: the reward is {short_repr(reward)}, not a number", []
        numbers.append(value)
    return "", numbers


def num_values(values: Any) -> int | None:
    """The number of values in a list, a tuple, an array or a tensor; None if it is nothing like these.

    A set has no order, so nothing says which completion a reward in it belongs to.
    """
    if not isinstance(values, Collection) or isinstance(values, Set | Mapping | str | bytes | bytearray):
        return None
    try:
        return len(values)
    except TypeError:  # of a tensor that is a single number
        return None


def not_a_list(values: Any, content: str) -> str:
    """Says what was returned in place of a list, as the end of a sentence."""
    order = ", which has no order," if isinstance(values, Set) else ""
    return f"a {type(values).__name__}{order} instead of a list of {content}"


def to_number(reward: Any) -> float | None:
    """A reward as a float; infinite if it is too large for one, and None if it is no real number.

    Numbers of Python (also true and false), NumPy and torch are read; a text and a complex number are not.
    """
    if isinstance(reward, str | bytes) or not isinstance(reward, SupportsFloat):
        return None
    try:
        value = complex(reward)  # `float` drops the imaginary part of NumPy's numbers
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: of a tensor with several numbers
        return None
    return value.real if value.imag == 0 else None


def short_repr(value: Any) -> str:
    """The beginning of a value as Python writes it."""
    try:
        return f"{value!r:.40}"
    except ValueError:  # of an integer of more than 4300 digits
        return "a number of more digits than Python writes"
