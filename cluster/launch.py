"""Runs a configuration: in this process, or in a Ray Train worker group on a Ray cluster."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from alignment.environment import NO_BARS, compute_on, inherited_variables
from alignment.errors import ClusterError, ConfigError
from alignment.failure import clear_failure, failure_of
from alignment.files import replace_atomically
from alignment.settings.plugins import MODULE_FOLDERS
from alignment.settings.run import ZeroConfig
from alignment.settings.schema import json_schema
from cluster.config import ClusterRunConfig, load_run
from cluster.plan import Plan, check_fits, check_machine, collective_timeout_s, plan
from cluster.ray_access import check_token, protect_token_file, require_token

if TYPE_CHECKING:
    import torch
    from ray.train.torch import TorchTrainer

    from alignment.rollout import Generator
    from alignment.vllm.engine import RolloutEngineSettings
    from cluster.engines import Engines


def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file of the run, such as configs/align/demo.yaml")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the file's, as optim.lr=1e-6")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load, read, check and try to save everything, but take no step.")
    ] = False,
) -> None:
    """Trains a model on preferences, as a YAML file says.

    Everything is written below runs/NAME: metrics.jsonl, tensorboard/, samples.jsonl, checkpoints/. A run that was
    stopped goes on from its newest intact checkpoint when the same command is given again.
    """
    settings = load_run(config, overrides or [])
    if dry_run:
        rehearse(settings)
    else:
        run(settings)


def rehearse(config: ClusterRunConfig) -> None:
    """Does everything that comes before the first step of a run, in this process, and leaves no files.

    It starts neither Ray nor engines, and it does not shard models, whatever `optim.zero` says.

    Raises:
        AlignmentError: an error that would end the run before its first step.
    """
    device = _device_here()
    from alignment.distributed.world import World
    from alignment.metrics import NoteReporter
    from alignment.models.folders import with_checkpoints
    from alignment.train import rehearse as loop

    config = with_checkpoints(config)
    if config.cluster.workers:
        print(f"dry run: the cluster would be asked for {plan(config).sentence}", flush=True)
    else:
        _check_machine(config)
    local_config = config.model_copy(update={"optim": config.optim.model_copy(update={"zero": ZeroConfig()})})
    created_folders = [folder for folder in (config.folder, *config.folder.parents) if not folder.exists()]
    try:
        loop(local_config, World(device=device), NoteReporter())
    finally:
        if config.folder in created_folders:
            shutil.rmtree(config.folder, ignore_errors=True)
        for folder in created_folders:
            with contextlib.suppress(OSError):  # another process may use it by now
                folder.rmdir()


def run(config: ClusterRunConfig) -> None:
    """Runs a configuration to its end.

    Raises:
        AlignmentError: any error of the run, also one of a worker.
    """
    from alignment.models.folders import with_checkpoints

    config = with_checkpoints(config)
    _save_config(config)
    if config.cluster.workers:
        with _ray_for(config):
            _run_on_ray(config)
        return
    device = _device_here()
    from alignment.distributed.world import World
    from alignment.metrics import FileReporter
    from alignment.train import train as loop

    _check_machine(config)
    with _engine_here(config) as generator:
        loop(config, World(device=device), FileReporter(config), generator)


def _save_config(config: ClusterRunConfig) -> None:
    """Writes the configuration to the run's folder, atomically.

    Raises:
        ConfigError: the folder or the file cannot be written.
    """
    file = config.make_folder().config_file
    try:
        with replace_atomically(file) as partial_file:
            partial_file.write_text(config.model_dump_json(indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output {config.output!r}: {file} cannot be written: {error.strerror}") from error


def _check_machine(config: ClusterRunConfig) -> None:
    """Checks that the run fits on this machine, and prints advice."""
    import torch

    if text := check_machine(config, gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0):
        print(text, flush=True)


def _device_here() -> torch.device:
    """The device that this process trains on; prepares it."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute_on(device.type)
    return device


@contextlib.contextmanager
def _engine_here(config: ClusterRunConfig) -> Iterator[Generator | None]:
    """Starts a vLLM engine beside the loop if the run needs one, and ends it after the context."""
    if not config.wants_engines:
        yield None
        return
    import torch

    from alignment.vllm.local import local_generator

    print("rollout: starting a vLLM engine …", flush=True)
    with contextlib.closing(local_generator(_engine_settings(config, gpu=torch.cuda.is_available()))) as generator:
        yield generator


def _engine_settings(config: ClusterRunConfig, *, gpu: bool) -> RolloutEngineSettings:
    """The settings of the run's engines.

    Args:
        gpu: whether they run on GPUs.
    """
    from alignment.vllm.engine import RolloutEngineSettings

    device: Literal["cpu", "cuda"] = "cuda" if gpu else "cpu"
    # Engines on one machine share its cores, and more threads than cores would slow each other down.
    engines = config.cluster.engines if config.cluster.workers else 1
    threads = max(1, len(os.sched_getaffinity(0)) // engines)
    return RolloutEngineSettings.for_run(
        config.model, config.rollout, max_length=config.data.max_length, device=device, threads=threads
    )


@contextlib.contextmanager
def _ray_for(config: ClusterRunConfig) -> Iterator[None]:
    """Ray on this machine, or the cluster that the run names, until the block ends."""
    has_joined = start_ray(config.cluster.address or os.environ.get("RAY_ADDRESS"))
    import ray

    try:
        yield
    finally:
        if has_joined:
            ray.shutdown()


def _run_on_ray(config: ClusterRunConfig) -> None:
    """Runs Ray Train's workers until the run ends, and raises its error."""
    import ray
    from ray.train.v2.api.exceptions import TrainingFailedError

    from alignment.shared_folder import leave_mark
    from cluster.final_error import final_error

    cluster_plan = plan(config)
    if not config.cluster.autoscaling:
        check_fits(cluster_plan, nodes=[node["Resources"] for node in ray.nodes() if node["Alive"]])
    print(f"cluster: starting {cluster_plan.sentence} …", flush=True)
    with leave_mark(config.folder) as mark, _engines_on_ray(config, cluster_plan) as engines:
        clear_failure(config.run_folder)
        trainer = _trainer(config, cluster_plan, engines, mark)
        # Ray Train's own files about an earlier fit of this name are not needed, and a damaged one would be fatal.
        shutil.rmtree(config.run_folder.ray_folder, ignore_errors=True)
        try:
            trainer.fit()
        except TrainingFailedError as error:
            if failure := final_error(error) or failure_of(config.run_folder):
                raise failure from None
            raise ClusterError(
                f"the workers failed more than cluster.max_failures ({config.cluster.max_failures}) times: {error}"
            ) from error


@contextlib.contextmanager
def _engines_on_ray(config: ClusterRunConfig, cluster_plan: Plan) -> Iterator[Engines | None]:
    """Starts the run's engines, which survive a restart of the workers; None if the run needs none."""
    if not cluster_plan.engines:
        yield None
        return
    from cluster.engines import running_engines

    settings = _engine_settings(config, gpu=config.gpus_of_engine > 0)
    cpus, gpus = config.cluster.cpus_per_engine, config.gpus_of_engine
    with running_engines(settings, count=cluster_plan.engines, cpus=cpus, gpus=gpus) as engines:
        yield engines


def start_ray(address: str | None) -> bool:
    """Joins the Ray cluster at an address, or starts Ray on this machine, with token authentication.

    Returns:
        False if this process belonged to a cluster already, which then stays as it is.

    Raises:
        ClusterError: no cluster answers at the address, or it has no authentication.
    """
    # Ray reads these when it is imported or starts. By default, its workers run at niceness 15, which gives them only
    # half of a busy laptop.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if not sys.stdout.isatty():  # without this, each line in a file would begin with the name of a process
        os.environ.setdefault("RAY_DISABLE_WORKER_LOG_PREFIX", "1")
    if not address:  # without the first, Ray replaces 127.0.0.1 by the machine's public address, on Linux too
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # this machine is never preempted
    import ray

    if ray.is_initialized():
        return False
    require_token()
    if address:
        _join_ray(address)
    else:
        _start_ray_here()
    return True


def _join_ray(address: str) -> None:
    """Joins the Ray cluster at an address, if it has authentication."""
    import ray

    try:
        ray.init(address=address)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {error}") from error
    try:
        check_token(ray.get_runtime_context().gcs_address)
    except ClusterError:
        ray.shutdown()
        raise


def _start_ray_here() -> None:
    """Starts Ray on this machine, on the loopback interface."""
    import ray

    with socket.create_server(("127.0.0.1", 0)) as free_socket:
        port = free_socket.getsockname()[1]
    # Tells Ray Train's helper processes which Ray they belong to. They would guess, and fail if another Ray runs on the
    # same machine, such as that of `raylign serve`.
    variables = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"127.0.0.1:{port}"}
    os.environ.update(variables)
    try:
        ray.init(address="local", logging_level="warning", _node_ip_address="127.0.0.1")
        protect_token_file()
    finally:
        for name in variables:
            del os.environ[name]


def _trainer(config: ClusterRunConfig, cluster_plan: Plan, engines: Engines | None, mark: str) -> TorchTrainer:
    """Makes Ray Train's trainer of a run."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from cluster.final_error import StopOnFinalError
    from cluster.rendezvous import OwnAddressConfig
    from cluster.worker import run as worker

    return TorchTrainer(
        worker,
        train_loop_config={
            "config": config.model_dump_json(),
            "folder": os.getcwd(),
            "module_folders": MODULE_FOLDERS,
            "bar": sys.stdout.isatty(),
            "engines": engines,
            "mark": mark,
        },
        torch_config=OwnAddressConfig(timeout_s=collective_timeout_s(config)),
        scaling_config=ScalingConfig(
            num_workers=cluster_plan.workers,
            use_gpu=config.cluster.gpus_per_worker > 0,
            resources_per_worker=cluster_plan.resources,
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=str(config.run_folder.ray_folder.resolve()),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            # On another machine, Ray's worker loads torch before any of our modules.
            worker_runtime_env={"env_vars": inherited_variables() | NO_BARS},
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[StopOnFinalError()],
        ),
    )


def schema() -> None:
    """Prints the JSON Schema of a run's YAML file.

    In VS Code, `# yaml-language-server: $schema=raylign.schema.json` as a file's first line completes its keys.
    """
    print(json.dumps(json_schema(ClusterRunConfig), indent=1))
