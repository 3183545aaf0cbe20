"""A run between its first and its last step: its models, data, source of groups and reports, and where it stands."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import cast

from filelock import FileLock, Timeout

from alignment import checkpoint
from alignment.algorithms import Algorithm
from alignment.batch import Role
from alignment.checkpoint import Progress, ResumeState
from alignment.data.agreement import check_data
from alignment.data.chat_templates import DATE_OF_RUN, run_date
from alignment.data.reader import GroupReader
from alignment.data.snapshot import keep_live_rows
from alignment.data.stream import Data, ListStream, LiveStream, load_data
from alignment.data.vocabulary import BoundedGroupTokenizer
from alignment.distributed.world import World, run_on_all, run_on_main
from alignment.errors import ConfigError, GuardError
from alignment.evaluate import Evaluator, SampledEvaluation
from alignment.failure import clear_failure
from alignment.group_source import DataSource, GroupSource, StepBatch
from alignment.guards import RunGuards
from alignment.identity import Identity, identify, notes
from alignment.metrics import Metrics, Reporter
from alignment.models.roles import Roles
from alignment.reference import precompute
from alignment.rewards import BuildableScorer, Rewards
from alignment.rollout import Generator
from alignment.rollout.local import LocalGenerator
from alignment.rollout.queue import RolloutQueue
from alignment.rollout.sampler import Sampler
from alignment.run_folder import RunFolder
from alignment.run_log import RunLog
from alignment.settings.run import OptimConfig, RunConfig
from alignment.step import StepSettings, learning_rate
from alignment.stored_run import StoredRun

MANY_STEPS = 200
"""Steps that one would not want to lose."""


@dataclasses.dataclass(kw_only=True)
class Run:
    """What the loop works with. Every worker has one, and calls the same methods in the same order."""

    config: RunConfig
    world: World
    reporter: Reporter
    algorithm: Algorithm
    roles: Roles
    data: Data
    source: GroupSource
    evaluator: Evaluator
    guards: RunGuards
    run_log: RunLog
    identity: Identity
    stored_run: StoredRun
    num_steps: int
    num_roll_backs: int = 0

    @classmethod
    def set_up(
        cls, config: RunConfig, world: World, reporter: Reporter, generator: Generator | None, stored_run: StoredRun
    ) -> Run:
        """Loads models and data, checks that they fit together and that a checkpoint can be written.

        Args:
            generator: engines that answer prompts; None samples from the actor itself.
            stored_run: the run in its storage.

        Raises:
            AlignmentError: what would end the run before its first step.
        """
        algorithm = cast(Algorithm, config.algorithm)
        roles = Roles.build(config, world)
        if note := checkpoint.try_saving(config, roles, world=world, stored_run=stored_run):
            reporter.note(note)
        run_on_main(stored_run.fetch_inputs if world.is_main else None, world)
        data = _load_data(config, algorithm, roles, world, reporter)
        steps = num_steps(config, data)
        check_data(data, steps, world)
        config.check_warmup(steps)
        reporter.note(f"data: {data.report}")
        if not data.eval and (names := settings_of_held_out_rows(config)):
            reporter.note(
                f"WARNING: nothing is held out, so {', '.join(names)} will do nothing; data.eval, or data.eval_groups "
                "for rows of the training data, holds some out"
            )
        eval_rewards = run_on_all(lambda: Rewards(config.eval_rewards, world.device), world)
        run_log = RunLog(config.run_folder)
        source: GroupSource = DataSource(data.train, groups_per_step=config.groups_per_step)
        sampled_evaluation = None
        if config.answers_prompts:
            sampler = Sampler(config, roles.actor, generator or LocalGenerator(roles.actor), world)
            rewards = run_on_all(lambda: Rewards(config.rewards, world.device), world)
            if algorithm.is_online:
                source = RolloutQueue(config, algorithm, data.train, sampler, rewards, roles)
            sampled_evaluation = SampledEvaluation(
                config, sampler, rewards, eval_rewards, roles, publishes_weights=not algorithm.is_online
            )
        return cls(
            config=config,
            world=world,
            reporter=reporter,
            algorithm=algorithm,
            roles=roles,
            data=data,
            source=source,
            evaluator=Evaluator(config, algorithm, data.eval, roles, world, run_log, sampled_evaluation),
            guards=RunGuards(config.guards, eval_rewards=eval_rewards.names),
            run_log=run_log,
            identity=identify(
                config,
                data=data.fingerprint,
                num_groups=data.num_train,
                steps=steps,
                source=str(roles.actor.source),
            ),
            stored_run=stored_run,
            num_steps=steps,
        )

    def restore(self) -> ResumeState:
        """Puts the newest intact checkpoint back; step 0 if there is none.

        Raises:
            CheckpointError: it belongs to another run.
            ConfigError: it has more steps than the run.
        """
        resume_state = self._restore_newest()
        if resume_state.progress.step > self.num_steps:
            raise ConfigError(
                f"{self.config.folder} already has {resume_state.progress.step} steps, more than the {self.num_steps} "
                "asked for"
            )
        return resume_state

    def start(self) -> Progress:
        """Brings the run to where its newest checkpoint stands, or to its beginning; says which."""
        if self.roles.reference == "precomputed":
            self._precompute_reference()  # by the actor as it is before anything is restored
        resume_state = self.restore()
        progress, note = resume_state.progress, self.reporter.note
        run_on_main((lambda: self._complete_storage(progress)) if self.world.is_main else None, self.world)
        if progress.step == self.num_steps:
            self._finish_uploads()
            note(f"{self.config.folder} is finished: all {progress.step} steps are done. More steps, or another name?")
            return progress
        resume_note = f"resuming after step {progress.step}{self._changes_since(resume_state)}"
        note(resume_note if progress.step else f"starting {self.num_steps} steps")
        if self.config.checkpoint.every == 0 and self.num_steps - progress.step > MANY_STEPS:
            note("checkpoint.every is 0: nothing is kept of this run before its last step")
        self._begin(progress)
        if resume_state.rollouts and not self.source.restore(resume_state.rollouts):
            note("the stream gives other prompts than those that were answered ahead; they are answered anew")
        if progress.step == 0:
            self._evaluate_untrained(progress)
        return progress

    def step_settings(self, step: int, progress: Progress) -> StepSettings:
        """Learning rates, price of divergence and seed of one step (1 to num_steps)."""
        config = self.config
        lr: dict[Role, float] = {}
        if step > config.critic.warmup_steps or self.roles.critic is None:
            lr["actor"] = learning_rate(config.optim, step - 1, self.num_steps)
        if self.roles.critic is not None:
            scale = (config.critic.lr or config.optim.lr) / config.optim.lr
            lr["critic"] = scale * learning_rate(config.optim, step - 1, self.num_steps)
        return StepSettings(lr=lr, kl_coefficient=progress.kl_coefficient, seed=config.seed + step)

    def evaluate_if_due(self, step: int) -> Metrics:
        """Figures on what is held out, if they are to be taken after this step."""
        return self.evaluator.evaluate(step) if self._is_due(step, self.config.evaluate.every) else {}

    def advance(self, progress: Progress, batch: StepBatch, metrics: Metrics) -> Progress:
        """Where the run stands after a step: the position in the data, and the next price of divergence."""
        num_completions = sum(len(group.completions) for group in batch.groups)
        kl_coefficient = self.algorithm.next_kl_coefficient(
            progress.kl_coefficient, kl=metrics.get("kl", 0.0), num_completions=num_completions
        )
        return Progress(step=progress.step + 1, position=batch.position, kl_coefficient=kl_coefficient)

    def log_provenance(self, step: int, batch: StepBatch) -> None:
        """Logs which prompts were sampled for a step, and by which weights."""
        if batch.provenance is not None and self.world.is_main:
            self.run_log.write_step(step, batch.position, batch.provenance)

    def save_if_due(self, progress: Progress) -> None:
        """Writes a checkpoint, if one is to be written after this step."""
        if self._is_due(progress.step, self.config.checkpoint.every):
            self._save(progress)

    def act_on(self, problems: list[str], step: int, position: int) -> Progress | None:
        """Acts as `guards.action` says on what the guards have found after a step.

        Returns:
            None to go on; else where the run stands after a roll-back to the newest checkpoint: it goes on from there
            with the groups from `position` on.

        Raises:
            GuardError: the run is to stop, or has been rolled back as often as it may be.
        """
        guards, text = self.config.guards, f"step {step}: " + "; ".join(problems)
        if guards.action == "warn":
            self.reporter.note(f"WARNING, {text}")
            return None
        if guards.action == "stop" or self.num_roll_backs == guards.max_roll_backs:
            raise GuardError(text if guards.action == "stop" else f"{text}, after {self.num_roll_backs} roll-backs")
        self.num_roll_backs += 1
        self.source.clear()
        resume_state = self._restore_newest()
        progress = dataclasses.replace(resume_state.progress, position=position)
        self.reporter.note(f"{text}. Rolling back to step {progress.step}, going on with the prompts that come next")
        self.guards.reset()
        self._begin(progress)
        if progress.step == 0:
            self._evaluate_untrained(progress)
        self._save(progress)  # so that a restart goes on with these prompts too
        return progress

    def finish(self, *, steps_done: int, seconds: float) -> Metrics:
        """Says and writes what the run has come to; returns the figures of the steps that this process did."""
        if isinstance(self.data.train, LiveStream):  # of a list it was told before the first step
            self.reporter.note(f"data: the stream gave {self.data.train.summary()}")
        summary = {
            "steps": float(self.num_steps),
            "seconds_training": seconds,
            "groups_per_second": steps_done * self.config.groups_per_step / seconds,
        }
        if self.config.checkpoint.storage is not None:
            summary["failed_uploads"] = self._finish_uploads()
        if self.world.is_main:
            self.config.run_folder.write_summary(summary)
        self.evaluator.write_samples(self.num_steps)
        self.reporter.close()
        command = "serve" if self.algorithm.head == "language" else "reward-server"
        self.reporter.note(f"done. raylign {command} {self.config.folder} puts it behind HTTP")
        return summary

    def describe_first_step(self) -> str:
        """What the next step would train on, in words; for a run that takes none."""
        progress = self.restore().progress
        self.data.train.position = progress.position
        num_tokens = [group.num_tokens for group in self.data.train.take(self.config.groups_per_step)]
        return (
            f"{self.num_steps - progress.step} steps are to be done, after {progress.step}; the next one has "
            f"{len(num_tokens)} groups of {min(num_tokens)} to {max(num_tokens)} tokens. Trained: "
            f"{', '.join(self.roles.backends_by_role)}; reference: {self.roles.reference}"
        )

    def _begin(self, progress: Progress) -> None:
        """Makes everything stand where `progress` says: reports, logs, position, engines."""
        self.evaluator.last_step = None
        self.reporter.begin(progress.step, self.num_steps)
        if self.world.is_main:
            self.run_log.truncate_after(progress.step)
        self.source.seek(progress.position, weight_version=progress.step)

    def _evaluate_untrained(self, progress: Progress) -> None:
        if metrics := self.evaluator.evaluate(0):
            self.reporter.report(0, metrics)
            self.guards.watch(metrics)
        self.evaluator.write_samples(0)
        if self.config.guards.action == "roll_back":
            self._save(progress)

    def _save(self, progress: Progress) -> None:
        if self.algorithm.head == "score" and self.evaluator.last_step != progress.step:
            self.evaluator.evaluate(progress.step)  # a reward model's checkpoint has the figures of its own scores
        checkpoint.save(
            self.config,
            self.roles,
            progress,
            identity=self.identity,
            world=self.world,
            rollouts=self.source.state(),
            stored_run=self.stored_run,
        )

    def _restore_newest(self) -> ResumeState:
        return checkpoint.restore(
            self.config, self.roles, identity=self.identity, world=self.world, stored_run=self.stored_run
        )

    def _complete_storage(self, progress: Progress) -> None:
        """Brings into the storage what it lacks: inputs of the run, and the checkpoint that the run resumes from."""
        self.stored_run.store_inputs()
        if progress.step:
            self.stored_run.complete(self.config.run_folder.checkpoint(progress.step))

    def _finish_uploads(self) -> float:
        """Waits until the last checkpoint is in the storage; returns how many uploads have failed."""
        run_on_main(self.stored_run.finish if self.world.is_main else None, self.world)
        return float(self.world.from_main(self.stored_run.num_failed_uploads))

    def _is_due(self, step: int, interval: int) -> bool:
        return step == self.num_steps or (interval > 0 and step % interval == 0)

    def _changes_since(self, resume_state: ResumeState) -> str:
        """What differs from the settings that a checkpoint was written with, in words; empty if nothing does."""
        changes = notes(resume_state.adjustable, self.identity)
        if not changes:
            return ""
        text, step = f", with changed settings: {', '.join(changes)}", resume_state.progress.step
        old_optim = OptimConfig.model_validate({**self.config.optim.model_dump(), **resume_state.adjustable["optim"]})
        old_rate = learning_rate(old_optim, step - 1, resume_state.adjustable["steps"])
        new_rate = learning_rate(self.config.optim, step, self.num_steps)
        if old_rate != new_rate:
            text += f". The learning rate was {old_rate:.3g} in step {step} and is {new_rate:.3g} in step {step + 1}"
            text += f" ({self.config.optim.schedule} over {self.num_steps} steps)"
        return text

    def _precompute_reference(self) -> None:
        """Gives every group that the run will see its reference log-probabilities."""
        stream = self.data.train
        assert isinstance(stream, ListStream), "reference_of refuses to precompute from a stream"
        guards, count = self.config.guards, self.num_steps * self.config.groups_per_step
        if guards.action == "roll_back":  # it goes on with the groups that come next
            count *= 1 + guards.max_roll_backs
        indices = sorted(set(stream.indices(0, count)))
        groups = [stream.groups[index] for index in indices] + self.data.eval
        groups = precompute(groups, self.roles, self.config, self.world, progress=self.world.is_main)
        for index, group in zip(indices, groups, strict=False):
            stream.groups[index] = group
        self.data.eval[:] = groups[len(indices) :]


def _load_data(config: RunConfig, algorithm: Algorithm, roles: Roles, world: World, reporter: Reporter) -> Data:
    model = roles.actor
    bad_rows = config.run_folder.bad_rows_file
    if world.is_main:
        bad_rows.unlink(missing_ok=True)
    if len(model.tokenizer) > model.num_embeddings:
        reporter.note(
            f"model: it embeds {model.num_embeddings} ids, and its tokenizer has ids up to "
            f"{len(model.tokenizer) - 1}; a row that uses one of the others is a bad one"
        )
    data = keep_live_rows(config.data, config.run_folder, world, reporter.note)
    date = run_on_main((lambda: run_date(config.run_folder)) if world.is_main else None, world)
    DATE_OF_RUN.set(date)
    reader = GroupReader(
        data,
        algorithm,
        BoundedGroupTokenizer(model.tokenizer, data, model.end_tokens, date=date, num_embeddings=model.num_embeddings),
        bad_rows if world.is_main else None,
        rewards=cast(Sequence[BuildableScorer], config.rewards),
        eval_rewards=cast(Sequence[BuildableScorer], config.eval_rewards),
    )
    return run_on_all(lambda: load_data(reader, seed=config.seed, progress=world.is_main), world)


def settings_of_held_out_rows(config: RunConfig) -> list[str]:
    """The names of a run's settings that mean something for held-out rows alone."""
    settings = {
        "evaluate.every": config.evaluate.every,
        "evaluate.samples": config.evaluate.samples,
        "eval_rewards": config.eval_rewards,
        "guards.hacking_window": config.guards.hacking_window,
    }
    return [name for name, value in settings.items() if value]


def num_steps(config: RunConfig, data: Data) -> int:
    """Optimizer steps of a run: `steps` of the configuration, or as many as `epochs` take."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None and data.num_train is not None, "the configuration refuses epochs of a stream"
    return max(1, math.ceil(config.epochs * data.num_train / config.groups_per_step))


@contextlib.contextmanager
def run_lock(run_folder: RunFolder) -> Iterator[None]:
    """Holds the lock of a run's folder, which the system frees even if the process is killed.

    Raises:
        ConfigError: another process is training there.
    """
    try:
        with FileLock(run_folder.lock_file, timeout=0):
            clear_failure(run_folder)
            yield
    except Timeout as error:
        raise ConfigError(f"another process is training {run_folder}; wait for it, or choose another name") from error
