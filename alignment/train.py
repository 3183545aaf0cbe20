"""The loop: groups → reference → update → evaluation → checkpoint. Every worker runs it; alone it is the whole program.

GroupStream ─► take ─► train_step ─► report ─► evaluate ─► save
                         ▲  Roles: actor, reference           │
                         └──────── restore ◄──────────────────┘
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from filelock import FileLock, Timeout

from alignment import checkpoint
from alignment.algorithms import Algorithm
from alignment.checkpoint import Progress
from alignment.config import RunConfig
from alignment.data.chat import GroupTokenizer
from alignment.data.stream import Data, GroupReader, ListStream, load_data
from alignment.errors import ConfigError
from alignment.metrics import Reporter
from alignment.models.parallel import World
from alignment.models.roles import Roles
from alignment.reference import precompute
from alignment.rollout.local import greedy
from alignment.types import Group
from alignment.update import Metrics, evaluate, learning_rate, train_step

SUMMARY = "summary.json"


def train(config: RunConfig, world: World, reporter: Reporter) -> Metrics:
    """Runs a configuration to its end, from its newest intact checkpoint if it has one.

    Everything is written below `config.folder`. Returns the figures that `summary.json` keeps too; none if the run was
    finished already.

    Raises:
        AlignmentError: any of its kinds; the text is for the person who started the run.
    """
    with _only_run(config.folder) if world.is_main else contextlib.nullcontext():
        return _Run(config, world, reporter).to_the_end()


class _Run:
    """One training run between its first and its last step."""

    def __init__(self, config: RunConfig, world: World, reporter: Reporter) -> None:
        self.config = config
        self.world = world
        self.reporter = reporter
        self.algorithm = cast(Algorithm, config.algorithm)
        torch.manual_seed(config.seed + world.rank)
        self.roles = Roles.build(config, world)
        self.data = self._load_data()
        self.steps = num_steps(config, self.data)
        reporter.note(f"data: {self.data.report}")
        if self.roles.reference == "precomputed":
            self._precompute_reference()

    def to_the_end(self) -> Metrics:
        config, reporter = self.config, self.reporter
        progress = checkpoint.restore(config, self.roles, data=self.data.fingerprint, world=self.world)
        if progress.step > self.steps:
            raise ConfigError(
                f"{config.folder} already has {progress.step} steps, more than the {self.steps} asked for"
            )
        if progress.step == self.steps:
            reporter.note(f"{config.folder} is finished: all {self.steps} steps are done. More steps, or another name?")
            return {}
        reporter.note(f"resuming after step {progress.step}" if progress.step else f"starting {self.steps} steps")
        reporter.begin(progress.step, self.steps)
        self.data.train.position = progress.position
        if progress.step == 0:
            if before := self._evaluate():
                reporter.report(0, before)
            self._sample(0)
        started = time.perf_counter()
        for step in range(progress.step + 1, self.steps + 1):
            self._step(step)
        summary = self._summarise(self.steps - progress.step, time.perf_counter() - started)
        self._sample(self.steps)
        reporter.close()
        reporter.note(f"done. raylign serve {config.folder} puts it behind an endpoint")
        return summary

    def _step(self, step: int) -> None:
        config, started = self.config, time.perf_counter()
        groups = self.data.train.take(config.groups_per_step)
        lr = learning_rate(config.optim, step - 1, self.steps)
        metrics = train_step(self.roles, self.algorithm, groups, config.optim, self.world, lr=lr)
        seconds = time.perf_counter() - started
        metrics |= {"perf/seconds": seconds, "perf/tokens_per_second": metrics["num_tokens"] / seconds}
        if _is_due(step, config.evaluate.every, self.steps):
            metrics |= self._evaluate()
        # Reported before it is saved: a checkpoint never knows of a step that the metrics lack.
        self.reporter.report(step, metrics)
        if _is_due(step, config.checkpoint.every, self.steps):
            progress = Progress(step=step, position=self.data.train.position)
            checkpoint.save(config, self.roles, progress, data=self.data.fingerprint, world=self.world)

    def _evaluate(self) -> Metrics:
        if not self.data.eval:
            return {}
        metrics = evaluate(self.roles, self.algorithm, self.data.eval, self.config.optim, self.world)
        return {f"eval/{name}": value for name, value in metrics.items()}

    def _load_data(self) -> Data:
        config, model = self.config, self.roles.actor
        bad_rows = config.folder / "bad_rows.jsonl"
        if self.world.is_main:
            bad_rows.unlink(missing_ok=True)
        reader = GroupReader(
            config.data,
            self.algorithm,
            GroupTokenizer(model.tokenizer, config.data, model.end_tokens),
            bad_rows if self.world.is_main else None,
        )
        return load_data(reader, seed=config.seed, progress=self.world.is_main)

    def _precompute_reference(self) -> None:
        stream = self.data.train
        assert isinstance(stream, ListStream), "reference_of refuses to precompute from a stream"
        visited = sorted(set(stream.indices(0, self.steps * self.config.groups_per_step)))
        groups = [stream.groups[index] for index in visited] + self.data.eval
        known = precompute(groups, self.roles, self.config, self.world, progress=self.world.is_main)
        for index, group in zip(visited, known, strict=False):
            stream.groups[index] = group
        self.data.eval[:] = known[len(visited) :]

    def _sample(self, step: int) -> None:
        """Answers some held-out prompts and keeps prompt and answer."""
        groups = self.data.eval[: self.config.evaluate.samples]
        if not groups or not self.world.is_main:
            return
        prompts = [group.prompt_tokens for group in groups]
        answers = greedy(self.roles.actor, prompts, max_tokens=self.config.evaluate.sample_tokens)
        decode = self.roles.actor.tokenizer.decode
        with (self.config.folder / "samples.jsonl").open("a" if step else "w", encoding="utf-8") as file:
            for group, answer in zip(groups, answers, strict=True):
                sample = {"step": step, "prompt": _text(group), "tokens": len(answer), "answer": decode(answer)}
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")

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
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ConfigError(f"another process is training {folder}; wait for it, or choose another name") from error


def _is_due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def _text(group: Group) -> str:
    return group.prompt if isinstance(group.prompt, str) else "\n".join(turn.content for turn in group.prompt)
