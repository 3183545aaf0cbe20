"""A Ray Train worker: it makes the worker's World and reporter, and runs the same loop as a single process."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.environment import compute_on
from alignment.errors import AlignmentError, ConfigError
from alignment.metrics import Metrics, Reporter
from alignment.settings.plugins import search_for_modules
from alignment.settings.run import RunConfig

if TYPE_CHECKING:
    import torch

    from alignment.distributed.world import World
    from alignment.rollout import Generator
    from cluster.engines import Engines


class _NoBar:
    """Replaces the progress bar if the driver's output goes to a file."""

    def __init__(self, **_: Any) -> None: ...
    def update(self, _: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class RayReporter:
    """Reports evaluations and the last step to Ray Train too, which needs the same reports from all workers.

    It does not report every step, because Ray Train fetches reports once a second and a worker waits for that.
    """

    def __init__(self, inner: Reporter) -> None:
        self.inner = inner
        self.steps = 0

    def note(self, text: str) -> None:
        """Passes a text on."""
        self.inner.note(text)

    def begin(self, step: int, steps: int) -> None:
        """Passes the start on."""
        self.steps = steps
        self.inner.begin(step, steps)

    def report(self, step: int, metrics: Metrics) -> None:
        """Passes the metrics on, and reports evaluations and the last step to Ray Train."""
        import ray.train

        self.inner.report(step, metrics)
        if step == self.steps or any(name.startswith("eval/") for name in metrics):
            ray.train.report({"step": step, **metrics})

    def close(self) -> None:
        """Passes the end on."""
        self.inner.close()


def run(settings: dict[str, Any]) -> None:
    """The train function of the TorchTrainer.

    The loop finds its newest intact checkpoint itself, because a report to Ray Train may return before it is durable.

    Args:
        settings: `config`, the run's configuration as JSON; `folder`, the driver's current folder; `module_folders`,
            for modules that the configuration names; `bar`, whether to show a progress bar; `engines`, the names of the
            run's engines, or None; `mark`, the driver's mark in the run's folder.

    Raises:
        ConfigError: the run's folder is not the same folder as the driver's.
    """
    import ray.train
    import ray.train.torch
    import torch
    from ray.experimental import tqdm_ray

    device = ray.train.torch.get_device()
    compute_on(device.type)
    from alignment.failure import failure_of
    from alignment.metrics import FileReporter, Silent
    from alignment.train import train
    from cluster.config import ClusterRunConfig

    for module_folder in settings["module_folders"]:
        search_for_modules(Path(module_folder))
    config = ClusterRunConfig.model_validate_json(settings["config"])
    if Path(settings["folder"]).is_dir():  # relative paths of the configuration refer to the driver's folder
        os.chdir(settings["folder"])
    _check_folder(config, settings["mark"])
    _limit_logging()
    torch.set_num_threads(config.cluster.cpus_per_worker)
    world = _world(device)
    if failure := world.from_main(failure_of(config.run_folder)):
        raise failure  # raised again, as Ray Train restarted the workers before it learned that the error is final
    bar = tqdm_ray.tqdm if settings["bar"] else _NoBar
    inner = FileReporter(config, bar=bar) if world.is_main else Silent()
    with _attached_engines(settings["engines"], config, world) as generator:
        train(config, world, RayReporter(inner), generator)


def _world(device: torch.device) -> World:
    """This worker's position among Ray Train's workers."""
    import ray.train

    from alignment.distributed.world import World

    context = ray.train.get_context()
    return World(rank=context.get_world_rank(), size=context.get_world_size(), device=device)


def _limit_logging() -> None:
    """Drops log records of Ray Train that repeat what is printed already."""
    logging.getLogger().setLevel(logging.WARNING)  # below it, Ray Train logs every reported metric
    logging.getLogger("ray.train.v2._internal.util").addFilter(_is_no_error_of_ours)


def _check_folder(config: RunConfig, mark: str) -> None:
    """Raises ConfigError if the run's folder on this machine is not the driver's.

    A worker that is restarted on another machine would find no checkpoint there, and train from step 0 again.
    """
    from alignment.shared_folder import sees

    folder = config.folder.resolve()
    if not sees(folder, mark):
        raise ConfigError(
            f"output {config.output!r} must be shared by all machines, and {folder} on {socket.gethostname()} is "
            "another folder than where the run was started; set it to one of a file system that every node mounts"
        )


def _is_no_error_of_ours(_: logging.LogRecord) -> bool:
    """A filter that drops Ray Train's log of an AlignmentError, which is printed once and without a traceback."""
    return not isinstance(sys.exc_info()[1], AlignmentError)


@contextlib.contextmanager
def _attached_engines(engines: Engines | None, config: RunConfig, world: World) -> Iterator[Generator | None]:
    """The `Generator` over the run's engines; None if the run has none."""
    if engines is None:
        yield None
        return
    from alignment.distributed.world import run_on_all
    from cluster.engines import attach

    with contextlib.ExitStack() as stack:
        pool = run_on_all(lambda: attach(engines, config, world), world)
        stack.callback(pool.close)
        yield pool
