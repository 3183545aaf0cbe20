"""The rollout queue: prompts become scored groups, sampled as many steps ahead as configured."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from alignment.algorithms import Algorithm
from alignment.data.stream import GroupStream
from alignment.group_source import StepBatch
from alignment.groups import Completion, Group
from alignment.metrics import Metrics
from alignment.models.roles import Roles
from alignment.rewards import Rewards
from alignment.rollout.sampler import Sampler
from alignment.rollout.serialization import from_tensors, num_groups, to_tensors
from alignment.settings.run import RunConfig

MAX_REFILLS = 4
"""Times that a step waits for new prompts in place of uninformative groups, before it trains on those."""


@dataclass(frozen=True, kw_only=True)
class PendingRollouts:
    """Groups whose completions are being sampled."""

    groups: list[Group]
    position: int
    """Groups taken from the stream before these."""
    wait: Callable[[], list[Group]]
    """Waits for the completions and returns the groups with them, on every worker."""
    started_at: float


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """A scored group that waits for its step."""

    group: Group
    position: int
    """Groups taken from the stream up to and with this one."""


@dataclass(kw_only=True)
class RolloutCost:
    """Seconds and tokens that the rollouts of a step have taken."""

    rollout_s: float = 0.0
    reward_s: float = 0.0
    num_tokens: int = 0

    def metrics(self) -> Metrics:
        """The same as figures of a step, with tokens per second."""
        """The seconds and the speed of the rollouts, as metrics."""
        seconds = {"perf/rollout_seconds": self.rollout_s, "perf/reward_seconds": self.reward_s}
        if not self.rollout_s:
            return seconds
        return {**seconds, "perf/rollout_tokens_per_second": self.num_tokens / self.rollout_s}


class RolloutQueue:
    """The `GroupSource` of online algorithms: the groups of every step are sampled by the actor, then scored.

        stream ─► pending: being sampled ─► ready: sampled and scored ─► next_batch

    Groups that are not informative fall out on the way, and the ones after them move up. So a step that samples ahead
    is as large as one that does not. What the position of a checkpoint has not passed is stored with the checkpoint
    (`state`), also what the last step of a run samples ahead: a run that is continued with more steps trains on the
    same groups as a run that had them from the beginning.
    """

    def __init__(
        self,
        config: RunConfig,
        algorithm: Algorithm,
        stream: GroupStream,
        sampler: Sampler,
        rewards: Rewards,
        roles: Roles,
    ) -> None:
        self.config = config
        self.algorithm = algorithm
        self.stream = stream
        self.sampler = sampler
        self.rewards = rewards
        self.roles = roles
        self._pending: deque[PendingRollouts] = deque()
        self._ready: deque[ScoredGroup] = deque()
        self._received_at = 0.0

    def seek(self, position: int, *, weight_version: int) -> None:
        """Moves the stream, and loads the weights into the engines."""
        """Moves to a position of the stream, and loads the actor's weights into the engines."""
        self.stream.position = position
        self.sampler.publish(self.roles, weight_version)

    def publish(self, weight_version: int) -> Metrics:
        """Loads the weights into the engines; returns how long it took."""
        """Loads the actor's weights into the engines; returns the seconds that it took, as a metric."""
        return {"perf/sync_seconds": self.sampler.publish(self.roles, weight_version)}

    def next_batch(self) -> StepBatch:
        """Returns the groups of the next step; starts to sample those of the steps after it."""
        num_groups = self.config.groups_per_step
        num_ahead = num_groups * self.config.rollout.steps_ahead
        self._prefetch(num_groups + num_ahead)
        rollout_cost, num_receipts = RolloutCost(), 0
        scored_groups: list[ScoredGroup] = []
        informative: list[Group] = []
        while len(informative) < num_groups:
            if not self._ready:
                if len(scored_groups) >= num_groups and num_receipts > MAX_REFILLS:
                    break
                self._prefetch(num_groups - len(informative))
                self._receive(rollout_cost)
                num_receipts += 1
            scored_groups.append(self._ready.popleft())
            if self.algorithm.is_informative(scored_groups[-1].group):
                informative.append(scored_groups[-1].group)
        self._prefetch(num_ahead)
        groups = [scored_group.group for scored_group in scored_groups]
        num_refills = {"rollout/refills": float(len(groups) - num_groups)}
        return StepBatch(
            groups=informative or groups,
            position=scored_groups[-1].position,
            metrics={**rollout_cost.metrics(), **_rollout_metrics(groups), **num_refills},
            provenance=_provenance(informative or groups),
        )

    def clear(self) -> None:
        """Drops what was sampled ahead, after it has ended; the position of the stream stays as it is."""
        for pending_rollouts in self._pending:
            pending_rollouts.wait()
        self._pending.clear()
        self._ready.clear()

    def state(self) -> dict[str, Tensor]:
        """Returns what was sampled ahead, for a checkpoint, and waits for it. Called by every worker."""
        completed_groups = [pending_rollouts.wait() for pending_rollouts in self._pending]
        self._pending = deque(
            dataclasses.replace(pending_rollouts, wait=_constant(groups))
            for pending_rollouts, groups in zip(self._pending, completed_groups, strict=True)
        )
        return to_tensors([scored_group.group for scored_group in self._ready], completed_groups)

    def restore(self, tensors: dict[str, Tensor]) -> bool:
        """Puts back what `state` has returned, with the prompts that come next in the stream. Called by every worker.

        Returns:
            False if the stream has other prompts than those that were answered: then they are sampled anew.
        """
        position = self.stream.position
        prompts = self.stream.take(num_groups(tensors))
        saved_rollouts = from_tensors(tensors, prompts, self.sampler.completion)
        if saved_rollouts is None:
            self.stream.position = position
            return False
        scored_groups, pending_batches = saved_rollouts
        self._ready.extend(
            ScoredGroup(group=group, position=position + n) for n, group in enumerate(scored_groups, start=1)
        )
        position += len(scored_groups)
        for groups in pending_batches:
            self._pending.append(
                PendingRollouts(
                    groups=groups, position=position, wait=_constant(groups), started_at=time.perf_counter()
                )
            )
            position += len(groups)
        return True

    def _prefetch(self, count: int) -> None:
        """Starts to sample until so many groups are ready or pending, at most a step's at a time."""
        num_missing = count - len(self._ready) - sum(len(pending_rollouts.groups) for pending_rollouts in self._pending)
        while num_missing > 0:
            self._pending.append(self._start(min(num_missing, self.config.groups_per_step)))
            num_missing -= len(self._pending[-1].groups)

    def _start(self, count: int) -> PendingRollouts:
        position, started_at = self.stream.position, time.perf_counter()
        groups = self.stream.take(count)
        wait_for_groups = self.sampler.start(groups, range(position, position + len(groups)))
        return PendingRollouts(groups=groups, position=position, wait=wait_for_groups, started_at=started_at)

    def _receive(self, rollout_cost: RolloutCost) -> None:
        """Waits for the oldest pending groups, and has them scored."""
        pending_rollouts = self._pending.popleft()
        groups = pending_rollouts.wait()
        sampled_at = time.perf_counter()
        for offset, group in enumerate(self.rewards.score(groups, world=self.sampler.world), start=1):
            self._ready.append(ScoredGroup(group=group, position=pending_rollouts.position + offset))
        # Of two that began together, the second has taken only what it took after the first.
        rollout_cost.rollout_s += sampled_at - max(pending_rollouts.started_at, self._received_at)
        self._received_at = time.perf_counter()
        rollout_cost.reward_s += self._received_at - sampled_at
        rollout_cost.num_tokens += sum(len(completion.tokens) for group in groups for completion in group.completions)


def _constant(groups: list[Group]) -> Callable[[], list[Group]]:
    return lambda: groups


def _provenance(groups: list[Group]) -> dict[str, object]:
    """Which prompts were sampled, and by which weights."""
    versions = sorted({completion.weight_version or 0 for group in groups for completion in group.completions})
    return {"versions": versions, "prompts": [group.id for group in groups]}


def scores_of(name: str, completions: list[Completion]) -> list[float]:
    """The scores by one scorer, without the completions from which it abstained."""
    return [completion.scores[name] for completion in completions if name in completion.scores]


def _rollout_metrics(groups: list[Group]) -> dict[str, float]:
    """Figures about the completions of a step, with those of groups that are not informative."""
    completions = [completion for group in groups for completion in group.completions]
    rewards = [completion.reward or 0.0 for completion in completions]
    names = sorted({name for completion in completions for name in completion.scores})
    environment_rewards = [c.environment_reward for c in completions if c.environment_reward is not None]
    return {
        "reward": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        **{f"scores/{name}": statistics.fmean(scores_of(name, completions)) for name in names},
        **({"environment/reward": statistics.fmean(environment_rewards)} if environment_rewards else {}),
        "completions/mean_length": statistics.fmean(len(completion.tokens) for completion in completions),
        "completions/truncated": statistics.fmean(completion.truncated for completion in completions),
        "groups/equal_rewards": statistics.fmean(len({c.reward for c in g.completions}) == 1 for g in groups),
        "rollout/oldest_version": float(min(completion.weight_version or 0 for completion in completions)),
    }
