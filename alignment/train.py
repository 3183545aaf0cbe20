"""The loop: groups → update → evaluation → checkpoint. Every worker runs it; alone it is the whole program.

GroupStream ─► take ─► (Feed: draw, judge) ─► learn ─► (sync) ─► report ─► evaluate ─► save
                         ▲                     ▲  Roles: actor, critic, reference     │
                         │                     └────────────── restore ◄──────────────┘
                      Generator, Rewards
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from filelock import FileLock, Timeout

from alignment import checkpoint
from alignment.algorithms import Algorithm
from alignment.checkpoint import Progress, Restored
from alignment.config import OptimConfig, RunConfig
from alignment.data.agreement import check_data, check_step
from alignment.data.chat import DATE_OF_RUN, run_date
from alignment.data.snapshot import keep_live_rows
from alignment.data.stream import Data, GroupReader, ListStream, LiveStream, load_data
from alignment.data.vocabulary import BoundedGroupTokenizer
from alignment.errors import ConfigError, GuardError
from alignment.evaluate import Examination, prompt_text
from alignment.failure import clear_failure, telling_others
from alignment.guards import Guards
from alignment.identity import identify, notes
from alignment.journal import Journal
from alignment.metrics import Reporter
from alignment.models.parallel import World, on_every_worker, together
from alignment.models.roles import Roles
from alignment.reference import precompute
from alignment.rewards import BuildableScorer, Rewards
from alignment.rollout import Generator
from alignment.rollout.feed import Feed, Step
from alignment.rollout.local import LocalGenerator, greedy
from alignment.types import Group, Role
from alignment.update import Metrics, Pace, evaluate, learn, learning_rate

SUMMARY = "summary.json"
MANY_STEPS = 200
"""Steps that one would not want to lose."""


def train(config: RunConfig, world: World, reporter: Reporter, generator: Generator | None = None) -> Metrics:
    """Runs a configuration to its end, from its newest intact checkpoint if it has one.

    Everything is written below `config.folder`. Returns the figures that `summary.json` keeps too; none if the run was
    finished already.

    Args:
        generator: engines that answer prompts, for an algorithm that needs them; None samples from the model itself.

    Raises:
        AlignmentError: any of its kinds; the text is for the person who started the run.
    """
    with contextlib.ExitStack() as lock:
        together(lambda: lock.enter_context(_only_run(config.make_folder())) if world.is_main else None, world)
        with telling_others(config.folder, world):
            return _Run(config, world, reporter, generator).to_the_end()


def rehearse(config: RunConfig, world: World, reporter: Reporter) -> None:
    """Does all that comes before the first step, and no step: loads models, reads data, tries to save and to resume.

    Raises:
        AlignmentError: what would end the run before its first step.
    """
    with _only_run(config.make_folder()):
        _Run(config, world, reporter, None).rehearse()


class _Run:
    """One training run between its first and its last step."""

    def __init__(self, config: RunConfig, world: World, reporter: Reporter, generator: Generator | None) -> None:
        self.config = config
        self.world = world
        self.reporter = reporter
        self.algorithm = cast(Algorithm, config.algorithm)
        torch.manual_seed(config.seed + world.rank)
        self.roles = Roles.build(config, world)
        if note := checkpoint.try_saving(config, self.roles, world=world):
            reporter.note(note)
        self.data = self._load_data()
        self.steps = num_steps(config, self.data)
        check_data(self.data, self.steps, world)
        self.identity = identify(
            config,
            data=self.data.fingerprint,
            num_groups=self.data.num_train,
            steps=self.steps,
            source=str(self.roles.actor.source),
        )
        config.check_warmup(self.steps)
        reporter.note(f"data: {self.data.report}")
        self.generator = generator or LocalGenerator(self.roles.actor)
        self.judges = together(lambda: Rewards(config.judges, world.device), world)
        self.guards = Guards(config.guards, judges=self.judges.names)
        self.roll_backs = 0
        self.evaluated: int | None = None
        """Step whose model was evaluated last."""
        self.journal = Journal(config.folder)
        self.feed: Feed | None = None
        if config.answers_prompts:
            self.feed = Feed(
                config,
                self.algorithm,
                self.data.train,
                self.roles.actor,
                self.generator,
                together(lambda: Rewards(config.rewards, world.device), world),
                world,
            )

    def rehearse(self) -> None:
        """Finds where the run would begin, and what its first step would learn from."""
        progress = self._restore().progress
        self.data.train.position = progress.position
        groups = self.data.train.take(self.config.groups_per_step)
        tokens = [group.num_tokens for group in groups]
        roles = ", ".join(self.roles.trained_by_role)
        self.reporter.note(
            f"dry run: nothing is wrong. {self.steps - progress.step} steps are to be done, after {progress.step}; the "
            f"next one has {len(groups)} groups of {min(tokens)} to {max(tokens)} tokens. Trained: {roles}; reference: "
            f"{self.roles.reference}"
        )

    def _restore(self) -> Restored:
        restored = checkpoint.restore(self.config, self.roles, identity=self.identity, world=self.world)
        if restored.progress.step > self.steps:
            raise ConfigError(
                f"{self.config.folder} already has {restored.progress.step} steps, more than the {self.steps} asked for"
            )
        return restored

    def to_the_end(self) -> Metrics:
        config, reporter = self.config, self.reporter
        if self.roles.reference == "precomputed":
            self._precompute_reference()  # by the actor as it is before anything is restored
        restored = self._restore()
        progress = restored.progress
        if progress.step == self.steps:
            reporter.note(f"{config.folder} is finished: all {self.steps} steps are done. More steps, or another name?")
            return {}
        resuming = f"resuming after step {progress.step}{self._changed(restored)}"
        reporter.note(resuming if progress.step else f"starting {self.steps} steps")
        if config.checkpoint.every == 0 and self.steps - progress.step > MANY_STEPS:
            reporter.note("checkpoint.every is 0: nothing is kept of this run before its last step")
        self._begin(progress)
        if restored.rollouts and self.feed is not None and not self.feed.restore(restored.rollouts):
            reporter.note("the stream gives other prompts than those that were answered ahead; they are answered anew")
        if progress.step == 0:
            self._first(progress)
        started, first = time.perf_counter(), progress.step
        while progress.step < self.steps:
            progress = self._step(progress)
        if isinstance(self.data.train, LiveStream):  # what a list leaves out is told before the first step
            reporter.note(f"data: the stream gave {self.data.train.summary()}")
        summary = self._summarise(self.steps - first, time.perf_counter() - started)
        self._sample(self.steps)
        reporter.close()
        command = "serve" if self.algorithm.head == "language" else "reward-server"
        reporter.note(f"done. raylign {command} {config.folder} puts it behind HTTP")
        return summary

    def _changed(self, restored: Restored) -> str:
        """What differs from the part of the run that wrote a checkpoint, in words; empty if nothing does."""
        changes = notes(restored.adjustable, self.identity)
        if not changes:
            return ""
        text, step = f", with changed settings: {', '.join(changes)}", restored.progress.step
        before = OptimConfig.model_validate({**self.config.optim.model_dump(), **restored.adjustable["optim"]})
        rates = (
            learning_rate(before, step - 1, restored.adjustable["steps"]),
            learning_rate(self.config.optim, step, self.steps),
        )
        if rates[0] != rates[1]:
            text += f". The learning rate was {rates[0]:.3g} in step {step} and is {rates[1]:.3g} in step {step + 1}"
            text += f" ({self.config.optim.schedule} over {self.steps} steps)"
        return text

    def _begin(self, progress: Progress) -> None:
        """Makes everything stand where `progress` says: cursor, reports, engines."""
        self.evaluated = None
        self.reporter.begin(progress.step, self.steps)
        self.data.train.position = progress.position
        if self.world.is_main:
            self.journal.rewind(progress.step)
        if self.algorithm.samples:
            self._sync(progress.step)

    def _first(self, progress: Progress) -> None:
        if before := self._evaluate(0):
            self.reporter.report(0, before)
            self.guards.watch(before)
        self._sample(0)
        if self.config.guards.action == "roll_back":
            self._save(progress)

    def _step(self, progress: Progress) -> Progress:
        """Runs the step after `progress`; returns where the run stands then: further back, after a roll-back."""
        config, started, step = self.config, time.perf_counter(), progress.step + 1
        taken = self._take()
        check_step(taken.groups, step, self.world)
        metrics = taken.metrics | self._learn(step, taken.groups, progress.kl_coefficient)
        if self.algorithm.samples:
            metrics["perf/sync_seconds"] = self._sync(step)
        seconds = time.perf_counter() - started
        metrics |= {"perf/seconds": seconds, "perf/tokens_per_second": metrics["num_tokens"] / seconds}
        if _is_due(step, config.evaluate.every, self.steps):
            metrics |= self._evaluate(step)
        # Reported before it is saved: a checkpoint never knows of a step that the metrics lack.
        self.reporter.report(step, metrics)
        if (trouble := self.guards.watch(metrics)) and (back := self._act_on(trouble, step, taken.position)):
            return back
        if self.algorithm.samples and self.world.is_main:
            self.journal.step(step, taken.groups, taken.position)
        progress = Progress(
            step=step,
            position=taken.position,
            kl_coefficient=self.algorithm.next_kl_coefficient(
                progress.kl_coefficient, kl=metrics.get("kl", 0.0), completions=_num_completions(taken.groups)
            ),
        )
        if _is_due(step, config.checkpoint.every, self.steps):
            self._save(progress)
        return progress

    def _take(self) -> Step:
        if self.algorithm.samples:
            assert self.feed is not None
            return self.feed.take()
        groups = self.data.train.take(self.config.groups_per_step)
        return Step(groups=groups, position=self.data.train.position, metrics={})

    def _learn(self, step: int, groups: list[Group], kl_coefficient: float) -> Metrics:
        config, started = self.config, time.perf_counter()
        lr: dict[Role, float] = {}
        if step > config.critic.warmup_steps or self.roles.critic is None:
            lr["actor"] = learning_rate(config.optim, step - 1, self.steps)
        if self.roles.critic is not None:
            scale = (config.critic.lr or config.optim.lr) / config.optim.lr
            lr["critic"] = scale * learning_rate(config.optim, step - 1, self.steps)
        pace = Pace(lr=lr, kl_coefficient=kl_coefficient, seed=config.seed + step)
        metrics = learn(self.roles, self.algorithm, groups, config.optim, self.world, pace)
        if self.algorithm.samples:
            metrics |= {"kl_coefficient": kl_coefficient, "perf/update_seconds": time.perf_counter() - started}
        return metrics

    def _sync(self, version: int) -> float:
        """Brings the weights into the engines; returns the seconds that it took."""
        started = time.perf_counter()
        together(lambda: self.generator.load(self.roles.weights(version)), self.world)
        return time.perf_counter() - started

    def _act_on(self, trouble: list[str], step: int, position: int) -> Progress | None:
        """Warns, stops the run, or returns to the newest checkpoint, with the prompts from `position` on."""
        guards, text = self.config.guards, f"step {step}: " + "; ".join(trouble)
        if guards.action == "warn":
            self.reporter.note(f"WARNING, {text}")
            return None
        if guards.action == "stop" or self.roll_backs == guards.max_roll_backs:
            raise GuardError(text if guards.action == "stop" else f"{text}, after {self.roll_backs} roll-backs")
        self.roll_backs += 1
        if self.feed is not None:
            self.feed.forget()
        restored = checkpoint.restore(self.config, self.roles, identity=self.identity, world=self.world)
        back = dataclasses.replace(restored.progress, position=position)
        self.reporter.note(f"{text}. Rolling back to step {back.step}, going on with the prompts that come next")
        self.guards.forget()
        self._begin(back)
        if back.step == 0:
            self._first(back)
        self._save(back)  # so that a restart goes on with these prompts too
        return back

    def _save(self, progress: Progress) -> None:
        if self.algorithm.head == "score" and self.evaluated != progress.step:
            self._evaluate(progress.step)  # a reward model's checkpoint has the figures of its own scores
        rollouts = None if self.feed is None else self.feed.state()
        checkpoint.save(self.config, self.roles, progress, identity=self.identity, world=self.world, rollouts=rollouts)

    def _evaluate(self, step: int) -> Metrics:
        """Figures on what is held out, by names that begin with `eval/`."""
        self.evaluated = step
        if not self.data.eval:
            return {}
        metrics: Metrics = {}
        if not self.algorithm.samples:
            metrics = evaluate(self.roles, self.algorithm, self.data.eval, self.config.optim, self.world)
            self.roles.remember(metrics)
        if self.feed is not None:
            metrics |= self._answered(self.feed, step)
        return {f"eval/{name}": value for name, value in metrics.items()}

    def _answered(self, feed: Feed, step: int) -> Metrics:
        """Has the held-out prompts answered and judged, and keeps some of the answers."""
        if not self.algorithm.samples:
            self._sync(step)
        answers = Examination(self.data.eval, feed, self.judges, self.roles, self.config.optim, self.world)
        if self.world.is_main:
            self.journal.samples(answers.rows(step, self.config.evaluate.samples))
        return answers.metrics()

    def _load_data(self) -> Data:
        config, model = self.config, self.roles.actor
        bad_rows = config.folder / "bad_rows.jsonl"
        if self.world.is_main:
            bad_rows.unlink(missing_ok=True)
        if len(model.tokenizer) > model.num_embeddings:
            self.reporter.note(
                f"model: it embeds {model.num_embeddings} ids, and its tokenizer has ids up to "
                f"{len(model.tokenizer) - 1}; a row that uses one of the others is a bad one"
            )
        data = keep_live_rows(config.data, config.folder, self.world, self.reporter.note)
        date = on_every_worker((lambda: run_date(config.folder)) if self.world.is_main else None, self.world)
        DATE_OF_RUN.set(date)
        reader = GroupReader(
            data,
            self.algorithm,
            BoundedGroupTokenizer(
                model.tokenizer, data, model.end_tokens, date=date, num_embeddings=model.num_embeddings
            ),
            bad_rows if self.world.is_main else None,
            rewards=cast(Sequence[BuildableScorer], config.rewards),
            judges=cast(Sequence[BuildableScorer], config.judges),
        )
        return together(lambda: load_data(reader, seed=config.seed, progress=self.world.is_main), self.world)

    def _precompute_reference(self) -> None:
        stream = self.data.train
        assert isinstance(stream, ListStream), "reference_of refuses to precompute from a stream"
        guards, count = self.config.guards, self.steps * self.config.groups_per_step
        if guards.action == "roll_back":  # it goes on with the groups that come next
            count *= 1 + guards.max_roll_backs
        visited = sorted(set(stream.indices(0, count)))
        groups = [stream.groups[index] for index in visited] + self.data.eval
        known = precompute(groups, self.roles, self.config, self.world, progress=self.world.is_main)
        for index, group in zip(visited, known, strict=False):
            stream.groups[index] = group
        self.data.eval[:] = known[len(visited) :]

    def _sample(self, step: int) -> None:
        """Answers some held-out prompts and keeps prompt and answer; the feed's evaluation does so by itself."""
        groups = self.data.eval[: self.config.evaluate.samples]
        idle = not self.world.is_main and not self.roles.in_lockstep
        if not groups or idle or self.feed is not None or self.algorithm.head == "score":
            return
        prompts = [group.prompt_tokens for group in groups]
        answers = greedy(self.roles.actor, prompts, max_tokens=self.config.evaluate.sample_tokens)
        if not self.world.is_main:
            return
        decode = self.roles.actor.tokenizer.decode
        self.journal.samples(
            {"step": step, "prompt": prompt_text(group), "tokens": len(answer), "answer": decode(answer)}
            for group, answer in zip(groups, answers, strict=True)
        )

    def _summarise(self, steps_done: int, seconds: float) -> Metrics:
        """Figures of the part of the run that this process did."""
        groups = steps_done * self.config.groups_per_step
        summary = {
            "steps": float(self.steps),
            "seconds_training": seconds,
            "groups_per_second": groups / seconds,
        }
        if self.world.is_main:
            (self.config.folder / SUMMARY).write_text(json.dumps(summary))
        return summary


def num_steps(config: RunConfig, data: Data) -> int:
    """Optimizer steps of a run: as given, or as many as `epochs` take."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None and data.num_train is not None, "the configuration refuses epochs of a stream"
    return max(1, math.ceil(config.epochs * data.num_train / config.groups_per_step))


@contextlib.contextmanager
def _only_run(folder: Path) -> Iterator[None]:
    """Holds the run's lock, which the system frees even if the process is killed."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            clear_failure(folder)
            yield
    except Timeout as error:
        raise ConfigError(f"another process is training {folder}; wait for it, or choose another name") from error


def _is_due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def _num_completions(groups: list[Group]) -> int:
    return sum(len(group.completions) for group in groups)
