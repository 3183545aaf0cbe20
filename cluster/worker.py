"""What runs inside a Ray Train worker: its World, its reporter, and the same loop that runs alone."""

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
    from alignment.models.parallel import World
    from alignment.rollout import Generator
    from cluster.engines import Engines


class _NoBar:
    """Stands in for a progress bar where the driver's output goes to a file."""

    def __init__(self, **_: Any) -> None: ...
    def update(self, _: int) -> None: ...
    def close(self) -> None: ...


class RayReporter:
    """Passes evaluations and the last step on to Ray Train too, which needs them from every worker equally often.

    Not every step: Ray Train fetches reports once a second, and a worker waits until its last one is fetched.
    """

    def __init__(self, inner: Reporter) -> None:
        self.inner = inner
        self.steps = 0

    def note(self, text: str) -> None:
        self.inner.note(text)

    def begin(self, step: int, steps: int) -> None:
        self.steps = steps
        self.inner.begin(step, steps)

    def report(self, step: int, metrics: Metrics) -> None:
        import ray.train

        self.inner.report(step, metrics)
        if step == self.steps or any(name.startswith("eval/") for name in metrics):
            ray.train.report({"step": step, **metrics})

    def close(self) -> None:
        self.inner.close()


def run(settings: dict[str, Any]) -> None:
    """The train function of the TorchTrainer.

    Checkpoints are not handed to Ray Train: the loop finds its own newest intact one, because a report that has
    returned is not yet durable.

    Args:
        settings: `config`, the run's configuration as JSON; `folder`, the driver's, which relative paths mean;
            `module_folders`, where modules that the configuration names are looked for; `bar`, whether its output can
            show a progress bar; `engines`, where the run's engines are, if it has any; `mark`, what lies in the run's
            folder where the driver is.

    Raises:
        ConfigError: the run's folder is not the driver's.
    """
    import ray.train
    import ray.train.torch
    import torch
    from ray.experimental import tqdm_ray

    device = ray.train.torch.get_device()
    compute_on(device.type)
    from alignment.failure import failure_of
    from alignment.metrics import FileReporter, Silent
    from alignment.models.parallel import World
    from alignment.train import train
    from cluster.config import ClusterRunConfig

    for module_folder in settings["module_folders"]:
        search_for_modules(Path(module_folder))
    config = ClusterRunConfig.model_validate_json(settings["config"])
    if Path(settings["folder"]).is_dir():  # relative paths of the configuration mean the driver's folder
        os.chdir(settings["folder"])
    _check_folder(config, settings["mark"])
    logging.getLogger().setLevel(logging.WARNING)  # below it, Ray Train repeats every reported metric
    logging.getLogger("ray.train.v2._internal.util").addFilter(_is_no_error_of_ours)
    torch.set_num_threads(config.cluster.cpus_per_worker)
    context = ray.train.get_context()
    world = World(rank=context.get_world_rank(), size=context.get_world_size(), device=device)
    if failure := world.from_main(failure_of(config.folder)):
        raise failure  # again: Ray Train has restarted the workers before it was told not to
    inner = FileReporter(config.folder, bar=tqdm_ray.tqdm if settings["bar"] else _NoBar) if world.is_main else Silent()
    with _attached(settings["engines"], config, world) as generator:
        train(config, world, RayReporter(inner), generator)


def _check_folder(config: RunConfig, mark: str) -> None:
    """Refuses to work where the run's folder is another one than the driver's.

    A worker that begins anew on another machine would find no checkpoint there, and train from step 0.
    """
    from alignment.shared_folder import sees

    folder = config.folder.resolve()
    if not sees(folder, mark):
        raise ConfigError(
            f"output {config.output!r} must be shared by all machines, and {folder} on {socket.gethostname()} is "
            "another folder than where the run was started; set it to one of a file system that every node mounts"
        )


def _is_no_error_of_ours(_: logging.LogRecord) -> bool:
    """Filters Ray Train's record of a worker's exception: an error of ours is told once, without its traceback."""
    return not isinstance(sys.exc_info()[1], AlignmentError)


@contextlib.contextmanager
def _attached(engines: Engines | None, config: RunConfig, world: World) -> Iterator[Generator | None]:
    """The run's engines as the loop sees them."""
    if engines is None:
        yield None
        return
    from alignment.models.parallel import together
    from cluster.engines import attach

    with contextlib.ExitStack() as attached:
        pool = together(lambda: attach(engines, config, world), world)
        attached.callback(pool.close)
        yield pool
