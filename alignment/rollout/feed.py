"""From prompts to scored groups: drawn by the engines, judged by the scorers, as many steps ahead as configured."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from alignment.algorithms import Algorithm
from alignment.config import RunConfig
from alignment.data.stream import GroupStream
from alignment.errors import AlignmentError
from alignment.models.load import LanguageModel
from alignment.models.parallel import World
from alignment.rewards import Rewards
from alignment.rollout import Generator, Prompt, Rollout, Rollouts, Sampling
from alignment.types import Completion, Group

Result = TypeVar("Result")
MAX_REFILLS = 4
"""Times that uninformative groups of a step are replaced by new prompts before what there is has to do."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step learns from."""

    groups: list[Group]
    position: int
    """Prompts taken from the stream up to and with this step's."""
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """Prompts whose completions are being drawn."""

    groups: list[Group]
    position: int
    wait: Callable[[], Rollouts] | None
    """Only on the main worker."""
    started: float


class Feed:
    """Hands every step its groups, the same on every worker."""

    def __init__(
        self,
        config: RunConfig,
        algorithm: Algorithm,
        stream: GroupStream,
        model: LanguageModel,
        generator: Generator | None,
        rewards: Rewards,
        world: World,
    ) -> None:
        """`generator`: on the main worker; the others may have none."""
        self.config = config
        self.algorithm = algorithm
        self.stream = stream
        self.model = model
        self.generator = generator
        self.rewards = rewards
        self.world = world
        self._ahead: deque[_Drawing] = deque()

    def take(self, *, more: int) -> Step:
        """The groups of the next step; starts those of the steps after it, of which there are `more`.

        Raises:
            RolloutError: completions could not be drawn.
            RewardError: completions could not be judged.
        """
        if not self._ahead:
            self._ahead.append(self._start(self.config.groups_per_step))
        drawing = self._ahead.popleft()
        drawn = self._finish(drawing)
        while len(self._ahead) < min(self.config.rollout.steps_ahead, more):
            self._ahead.append(self._start(self.config.groups_per_step))
        ready = time.perf_counter()
        scored = self.rewards.score(drawn, world=self.world)
        seconds = {"perf/rollout_seconds": ready - drawing.started, "perf/reward_seconds": time.perf_counter() - ready}
        groups, position = self._informative(scored), drawing.position
        for _ in range(MAX_REFILLS):
            if len(groups) == len(drawing.groups) or self._ahead:
                break
            refill = self._start(len(drawing.groups) - len(groups))
            position = refill.position
            scored += (new := self.rewards.score(self._finish(refill), world=self.world))
            groups += self._informative(new)
        metrics = {**seconds, **_measured(scored), "rollout/refills": float(len(scored) - len(drawing.groups))}
        tokens = sum(len(completion.tokens) for group in drawn for completion in group.completions)
        metrics["perf/rollout_tokens_per_second"] = tokens / seconds["perf/rollout_seconds"]
        return Step(groups=groups or scored, position=position, metrics=metrics)

    def answer(self, groups: list[Group]) -> list[Group]:
        """One answer to each of some held-out prompts, with seeds that are the same at every evaluation; not scored."""
        plain = [dataclasses.replace(group, completions=()) for group in groups]
        sampling = dataclasses.replace(self._sampling(), completions=1)
        prompts = [Prompt(tokens=group.prompt_tokens, seed=self._seed(-1 - at)) for at, group in enumerate(plain)]
        wait, started = self._submit(prompts, sampling), time.perf_counter()
        return self._finish(_Drawing(groups=plain, position=0, wait=wait, started=started))

    def forget(self) -> None:
        """Drops what was drawn ahead; the stream's cursor is the caller's business."""
        for drawing in self._ahead:
            self._finish(drawing)
        self._ahead.clear()

    def _start(self, count: int) -> _Drawing:
        first = self.stream.position
        groups = self.stream.take(count)
        prompts = [
            Prompt(tokens=group.prompt_tokens, seed=self._seed(first + offset)) for offset, group in enumerate(groups)
        ]
        return _Drawing(
            groups=groups,
            position=self.stream.position,
            wait=self._submit(prompts, self._sampling()),
            started=time.perf_counter(),
        )

    def _submit(self, prompts: list[Prompt], sampling: Sampling) -> Callable[[], Rollouts] | None:
        if not self.world.is_main:
            return None
        assert self.generator is not None, "the main worker has the generator"
        return self.generator.submit(prompts, sampling)

    def _finish(self, drawing: _Drawing) -> list[Group]:
        """The drawn groups with their completions, on every worker."""
        rollouts = on_every_worker(drawing.wait, self.world)
        return [
            dataclasses.replace(group, completions=tuple(map(self._completion, drawn)))
            for group, drawn in zip(drawing.groups, rollouts, strict=True)
        ]

    def _completion(self, rollout: Rollout) -> Completion:
        return Completion(
            text=self.model.tokenizer.decode(rollout.tokens, skip_special_tokens=True),
            tokens=rollout.tokens,
            learned=(True,) * len(rollout.tokens),
            truncated=rollout.truncated,
            sampled_logprobs=rollout.logprobs,
            version=rollout.version,
        )

    def _informative(self, groups: list[Group]) -> list[Group]:
        return [group for group in groups if self.algorithm.is_informative(group)]

    def _sampling(self) -> Sampling:
        rollout = self.config.rollout
        return Sampling(
            completions=rollout.completions,
            max_tokens=rollout.max_tokens,
            max_length=self.config.data.max_length,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            end_tokens=self.model.end_tokens,
        )

    def _seed(self, number: int) -> int:
        return (self.config.seed * 1_000_003 + number * 7919) % 2**31


def on_every_worker(work: Callable[[], Result] | None, world: World) -> Result:
    """What the main worker's `work` returns, on every worker; what it raises is raised everywhere, so none waits."""
    result: Result | None = None
    error: AlignmentError | None = None
    if work is not None:
        try:
            result = work()
        except AlignmentError as raised:
            error = raised
    result, error = world.from_main((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def together(work: Callable[[], None], world: World) -> None:
    """Does `work` on every worker; what one raises is raised by all, so that none waits for another."""
    error: AlignmentError | None = None
    try:
        work()
    except AlignmentError as raised:
        error = raised
    for one in world.gather(error):
        if one is not None:
            raise one


def _measured(groups: list[Group]) -> dict[str, float]:
    """Figures about the completions of a step, before any is left out."""
    completions = [completion for group in groups for completion in group.completions]
    rewards = [completion.reward or 0.0 for completion in completions]
    names = sorted({name for completion in completions for name in completion.scores})
    return {
        "reward": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        **{f"scores/{name}": statistics.fmean(c.scores[name] for c in completions) for name in names},
        "completions/mean_length": statistics.fmean(len(completion.tokens) for completion in completions),
        "completions/truncated": statistics.fmean(completion.truncated for completion in completions),
        "groups/equal_rewards": statistics.fmean(len({c.reward for c in g.completions}) == 1 for g in groups),
        "rollout/oldest_version": float(min(completion.version or 0 for completion in completions)),
    }
