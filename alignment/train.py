"""The loop. Every worker runs it; with one worker it is the whole program.

         GroupSource                         Roles: actor, critic, reference
data ──► DataSource ─────────────┐                     │
data ──► RolloutQueue ──────────►│ next_batch ──► train_step ──► publish ──► evaluate ──► report ──► guards ──► save
         ▲  Sampler, Rewards     │  (StepBatch)                     │                                  │
         └──────── weights ◄─────┴──────────────────────────────────┘          roll back to the newest ◄┘
"""

from __future__ import annotations

import contextlib
import time

import torch

from alignment.data.agreement import check_step
from alignment.distributed.world import World, run_on_all
from alignment.failure import propagate_failure
from alignment.metrics import Metrics, Reporter
from alignment.rollout import Generator
from alignment.run import Run, run_lock
from alignment.settings.run import RunConfig
from alignment.step import train_step
from alignment.stored_run import StoredRun


def train(config: RunConfig, world: World, reporter: Reporter, generator: Generator | None = None) -> Metrics:
    """Runs a configuration to its end, from its newest intact checkpoint if it has one.

    Everything is written below `config.folder`. Returns the figures that `summary.json` keeps too; none if the run was
    finished already.

    Args:
        generator: engines that answer prompts, for an algorithm that needs them; None samples from the model itself.

    Raises:
        AlignmentError: any of its kinds; the text is for the person who started the run.
    """
    with contextlib.ExitStack() as stack:
        run_on_all(lambda: stack.enter_context(run_lock(config.make_folder())) if world.is_main else None, world)
        stored_run = run_on_all(lambda: stack.enter_context(StoredRun(config, is_main=world.is_main)), world)
        stack.enter_context(propagate_failure(config.run_folder, world))
        stack.callback(reporter.close)
        torch.manual_seed(config.seed + world.rank)
        run = Run.set_up(config, world, reporter, generator, stored_run)
        progress = run.start()
        if progress.step == run.num_steps:
            return {}
        first_step, started_at = progress.step, time.perf_counter()
        while progress.step < run.num_steps:
            step, step_started_at = progress.step + 1, time.perf_counter()
            batch = run.source.next_batch()
            check_step(batch.groups, step, world)
            settings, update_started_at = run.step_settings(step, progress), time.perf_counter()
            metrics = batch.metrics | train_step(run.roles, run.algorithm, batch.groups, config.optim, world, settings)
            metrics["perf/update_seconds"] = time.perf_counter() - update_started_at
            metrics |= run.source.publish(step)
            metrics["perf/seconds"] = time.perf_counter() - step_started_at
            metrics["perf/tokens_per_second"] = metrics["num_tokens"] / metrics["perf/seconds"]
            metrics |= run.evaluate_if_due(step)
            reporter.report(step, metrics)  # before the checkpoint, which never knows of a step that the metrics lack
            if (problems := run.guards.watch(metrics)) and (rolled_back := run.act_on(problems, step, batch.position)):
                progress = rolled_back
                continue
            run.log_provenance(step, batch)
            progress = run.advance(progress, batch, metrics)
            run.save_if_due(progress)
        return run.finish(steps_done=run.num_steps - first_step, seconds=time.perf_counter() - started_at)


def rehearse(config: RunConfig, world: World, reporter: Reporter) -> None:
    """Does all that comes before the first step, and no step: loads models, reads data, tries to save and to resume.

    Raises:
        AlignmentError: what would end the run before its first step.
    """
    with run_lock(config.make_folder()), StoredRun(config, is_main=True) as stored_run:
        run = Run.set_up(config, world, reporter, None, stored_run)
        reporter.note(f"dry run: nothing is wrong. {run.describe_first_step()}")
