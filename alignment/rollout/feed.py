"""From prompts to scored groups: drawn by the engines, judged by the scorers, as many steps ahead as configured."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from alignment.algorithms import Algorithm
from alignment.config import RunConfig
from alignment.data.stream import GroupStream
from alignment.models.load import LanguageModel
from alignment.models.parallel import World, on_every_worker
from alignment.rewards import Rewards
from alignment.rollout import Generator, Prompt, Rollout, Rollouts, Sampling
from alignment.rollout.kept import from_tensors, num_groups, to_tensors
from alignment.types import Completion, Group

MAX_REFILLS = 4
"""Times that a step waits for new prompts in place of uninformative groups, before what there is has to do."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step learns from."""

    groups: list[Group]
    position: int
    """Prompts taken from the stream up to and with this step's; what was drawn for later steps lies beyond it."""
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """Prompts whose completions are being drawn."""

    groups: list[Group]
    first: int
    """Prompts taken from the stream before these."""
    wait: Callable[[], Rollouts] | None
    """Only on the main worker."""
    started: float
    drawn: list[Group] | None = None
    """The groups with their completions, if these are known already: at a checkpoint, and after one."""


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """A group that waits for its step."""

    group: Group
    position: int
    """Prompts taken from the stream up to and with this one."""


@dataclass(kw_only=True)
class _Spent:
    """Seconds and tokens that the rollouts of a step have taken."""

    rollout: float = 0.0
    reward: float = 0.0
    tokens: int = 0

    def metrics(self) -> dict[str, float]:
        found = {"perf/rollout_seconds": self.rollout, "perf/reward_seconds": self.reward}
        return {**found, "perf/rollout_tokens_per_second": self.tokens / self.rollout} if self.rollout else found


class Feed:
    """Hands every step its groups, the same on every worker, in the order of the stream.

        stream ─► drawings: being drawn ─► ready: drawn and scored ─► steps

    Uninformative groups fall out on the way, and the ones after them move up. So a step that draws ahead is as large as
    one that does not. Whatever a checkpoint's cursor has not passed is kept with it (`state`), and so is what the last
    step of a run draws ahead: with more steps, it goes on as if it had had them from the beginning.
    """

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
        self._drawings: deque[_Drawing] = deque()
        self._ready: deque[_Scored] = deque()
        self._received_at = 0.0

    def take(self) -> Step:
        """The groups of the next step; starts those of the steps after it.

        Raises:
            RolloutError: completions could not be drawn.
            RewardError: completions could not be judged.
        """
        size = self.config.groups_per_step
        ahead = size * self.config.rollout.steps_ahead
        self._provide(size + ahead)
        spent, receipts = _Spent(), 0
        seen: list[_Scored] = []
        informative: list[Group] = []
        while len(informative) < size:
            if not self._ready:
                if len(seen) >= size and receipts > MAX_REFILLS:
                    break
                self._provide(size - len(informative))
                self._receive(spent)
                receipts += 1
            seen.append(self._ready.popleft())
            if self.algorithm.is_informative(seen[-1].group):
                informative.append(seen[-1].group)
        self._provide(ahead)
        groups = [scored.group for scored in seen]
        refills = {"rollout/refills": float(len(seen) - size)}
        return Step(
            groups=informative or groups,
            position=seen[-1].position,
            metrics={**spent.metrics(), **_measured(groups), **refills},
        )

    def answer(self, groups: list[Group]) -> list[Group]:
        """One answer to each of some held-out prompts, with seeds that are the same at every evaluation; not scored."""
        plain = [dataclasses.replace(group, completions=()) for group in groups]
        sampling = dataclasses.replace(self._sampling(), completions=1)
        prompts = [Prompt(tokens=group.prompt_tokens, seed=self._seed(-1 - at)) for at, group in enumerate(plain)]
        return self._completed(plain, self._submit(prompts, sampling))

    def forget(self) -> None:
        """Drops what was drawn ahead; the stream's cursor is the caller's business."""
        for drawing in self._drawings:
            self._drawn(drawing)
        self._drawings.clear()
        self._ready.clear()

    def state(self) -> dict[str, Tensor]:
        """What was drawn ahead, for a checkpoint; waits for it. Called by every worker."""
        self._drawings = deque(dataclasses.replace(drawing, drawn=self._drawn(drawing)) for drawing in self._drawings)
        ready = [scored.group for scored in self._ready]
        return to_tensors(ready, [drawing.drawn or [] for drawing in self._drawings])

    def restore(self, tensors: dict[str, Tensor]) -> bool:
        """Puts back what `state` has returned, with the prompts that come next in the stream. Called by every worker.

        Returns:
            False if those are other prompts than the ones that were answered: then they will be answered anew.
        """
        first = self.stream.position
        prompts = self.stream.take(num_groups(tensors))
        kept = from_tensors(tensors, prompts, self._completion)
        if kept is None:
            self.stream.position = first
            return False
        scored, drawings = kept
        self._ready.extend(_Scored(group=g, position=first + n) for n, g in enumerate(scored, start=1))
        first += len(scored)
        for drawn in drawings:
            now = time.perf_counter()
            self._drawings.append(_Drawing(groups=drawn, first=first, wait=None, started=now, drawn=drawn))
            first += len(drawn)
        return True

    def _provide(self, count: int) -> None:
        """Starts drawings until so many groups are ready or on their way, at most a step's in each."""
        missing = count - len(self._ready) - sum(len(drawing.groups) for drawing in self._drawings)
        while missing > 0:
            self._drawings.append(self._start(min(missing, self.config.groups_per_step)))
            missing -= len(self._drawings[-1].groups)

    def _start(self, count: int) -> _Drawing:
        first, started = self.stream.position, time.perf_counter()
        groups = self.stream.take(count)
        prompts = [
            Prompt(tokens=group.prompt_tokens, seed=self._seed(first + offset)) for offset, group in enumerate(groups)
        ]
        return _Drawing(groups=groups, first=first, wait=self._submit(prompts, self._sampling()), started=started)

    def _receive(self, spent: _Spent) -> None:
        """Waits for the oldest drawing, and has it scored."""
        drawing = self._drawings.popleft()
        drawn = self._drawn(drawing)
        drawn_at = time.perf_counter()
        scored = self.rewards.score(drawn, world=self.world)
        for offset, group in enumerate(scored, start=1):
            self._ready.append(_Scored(group=group, position=drawing.first + offset))
        # Of drawings that began together, the second has taken what it took after the first.
        spent.rollout += drawn_at - max(drawing.started, self._received_at)
        self._received_at = time.perf_counter()
        spent.reward += self._received_at - drawn_at
        spent.tokens += sum(len(completion.tokens) for group in drawn for completion in group.completions)

    def _drawn(self, drawing: _Drawing) -> list[Group]:
        return self._completed(drawing.groups, drawing.wait) if drawing.drawn is None else drawing.drawn

    def _submit(self, prompts: list[Prompt], sampling: Sampling) -> Callable[[], Rollouts] | None:
        if not self.world.is_main:
            return None
        assert self.generator is not None, "the main worker has the generator"
        return self.generator.submit(prompts, sampling)

    def _completed(self, groups: list[Group], wait: Callable[[], Rollouts] | None) -> list[Group]:
        """Groups with their completions, once these are drawn; on every worker."""
        rollouts = on_every_worker(wait, self.world)
        return [
            dataclasses.replace(group, completions=tuple(map(self._completion, drawn)))
            for group, drawn in zip(groups, rollouts, strict=True)
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


def of_scorer(name: str, completions: list[Completion]) -> list[float]:
    """What a scorer gave those completions that it did not abstain from."""
    return [completion.scores[name] for completion in completions if name in completion.scores]


def _measured(groups: list[Group]) -> dict[str, float]:
    """Figures about the completions of a step, before any is left out."""
    completions = [completion for group in groups for completion in group.completions]
    rewards = [completion.reward or 0.0 for completion in completions]
    names = sorted({name for completion in completions for name in completion.scores})
    return {
        "reward": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        **{f"scores/{name}": statistics.fmean(of_scorer(name, completions)) for name in names},
        "completions/mean_length": statistics.fmean(len(completion.tokens) for completion in completions),
        "completions/truncated": statistics.fmean(completion.truncated for completion in completions),
        "groups/equal_rewards": statistics.fmean(len({c.reward for c in g.completions}) == 1 for g in groups),
        "rollout/oldest_version": float(min(completion.version or 0 for completion in completions)),
    }
