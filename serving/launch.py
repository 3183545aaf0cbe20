"""`raylign serve`: starts an endpoint for a checkpoint, and removes every trace of it at the end."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignment.errors import ClusterError, ServingError
from cluster.ray_access import check_token, protect_token_file, require_token
from serving.start import StartingEndpoint, deploy

if TYPE_CHECKING:
    from serving.config import ServeConfig
    from serving.registry.model_id import ModelId
    from serving.registry.models import EndpointModel, ServedModels
    from serving.registry.versions import Registry

APPLICATION = "raylign"
OBJECT_STORE_BYTES = 200 * 2**20  # only requests and answers pass through; Ray would take 30 % of the memory


def serve(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A run's folder or address (s3://…), a checkpoint, a model or adapter folder, a hub id, or "
            "smollm2-135m-instruct."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of serving/config.py, as port=8080 or dtype=fp32."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with settings, as configs/serve/local.yaml; KEY=VALUE goes first.")
    ] = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="Change to CHECKPOINT where another version answers so far.")
    ] = False,
) -> None:
    """Serves a checkpoint behind an OpenAI-compatible HTTP endpoint, until Ctrl-C.

    If another version was served under the same name before, that version is served again, and CHECKPOINT only becomes
    a version that can be promoted. A LoRA checkpoint is served together with its base model: the name that a request
    gives as `model` chooses between them. Ray is started on this machine; if RAY_ADDRESS is set, the endpoint is
    deployed on that cluster instead.
    """
    from serving.config import load_serve_config

    start_s = time.monotonic()
    _raise_on_signals()
    try:
        settings = [*(overrides or []), *(["promote=true"] if promote else [])]
        with endpoint(load_serve_config(checkpoint, settings, config)) as server:
            typer.echo(f"Ready after {time.monotonic() - start_s:.0f} s. {server}")
            threading.Event().wait()
    except KeyboardInterrupt:
        typer.echo("Stopped.")


@dataclass(frozen=True, kw_only=True)
class RunningEndpoint:
    """A running endpoint."""

    url: str
    """For example `http://127.0.0.1:8000`; OpenAI's clients need `/v1` after it."""
    names: list[str]
    """The model names that requests may give, the aligned model first."""
    version: int
    """Number of the version that answers."""
    needs_keys: bool
    """Whether requests need a key."""
    can_chat: bool = True
    """Whether the model has a chat template."""
    is_asleep: bool = False
    """Whether the first request must start a replica."""
    further_models: tuple[str, ...] = ()
    """The endpoint's further models, each with the version that answers, for people to read."""

    def __str__(self) -> str:
        question = {"messages": [{"role": "user", "content": "Hello!"}]} if self.can_chat else {"prompt": "Once upon"}
        route = "chat/completions" if self.can_chat else "completions"
        body = json.dumps({"model": self.names[0], **question, "max_tokens": 50})
        no_template = (
            " The model has no chat template, so chats are refused; chat_template=chatml or a Jinja file sets one."
        )
        asleep = (
            " No replica runs yet (min_replicas=0): the first request starts one and waits until it has loaded the "
            "model; whether it can is seen then."
        )
        note = ("" if self.can_chat else no_template) + (asleep if self.is_asleep else "")
        key = " -H 'Authorization: Bearer KEY'" if self.needs_keys else ""
        access = (
            f" with a KEY from `raylign keys create`; its page is {self.url}/"
            if self.needs_keys
            else f"; its page is {self.url}/"
        )
        further = "".join(f"; {text}" for text in self.further_models)
        return (
            f"{self.url}/v1 serves {' and '.join(self.names)}, version {self.version}{further}{access}.{note} Try: "
            f"curl {self.url}/v1/{route}{key} -H 'Content-Type: application/json' -d '{body}'"
        )


@contextmanager
def endpoint(config: ServeConfig) -> Iterator[RunningEndpoint]:
    """Starts an endpoint; it answers inside the `with` block and is removed after it.

    Raises:
        ServingError: the port is in use, another endpoint holds the registry's lease, or the engine did not start.
        CheckpointError, ModelError: the checkpoint cannot be served (see `serving.registry.served_model.publish`).
    """
    from serving.registry.models import publish_models
    from serving.registry.served_model import registry_of

    if _is_local():
        refuse_busy_port(config.host, config.port)
    owner = f"{secrets.token_hex(8)}/{APPLICATION}"
    with _hold_lease(config, registry_of(config), owner) as is_held:
        publication = publish_models(config, is_live=not is_held, may_promote=is_held)
        models, first = publication.models, publication.models.first
        for publication_note in publication.notes:
            typer.echo(publication_note)
        if note := _other_database(config, first.registry):
            typer.echo(note)
        action = "Starting Ray" if _is_local() else f"Connecting to Ray at {os.environ['RAY_ADDRESS']}"
        typer.echo(f"{action} to serve {' and '.join(models.names)} …")
        with _running_ray(config), _running_application(config, models, owner) as failures:
            yield _running_endpoint(config, [model for name, model in models.items() if name not in failures])


def _running_endpoint(config: ServeConfig, models: Sequence[EndpointModel]) -> RunningEndpoint:
    """Describes an endpoint by those of its models that have started."""
    first, *others = models
    return RunningEndpoint(
        url=config.url,
        names=first.served_model.names,
        version=first.registry.state().current,
        needs_keys=not config.no_keys,
        can_chat=first.served_model.can_chat,
        is_asleep=not first.config.min_replicas,
        further_models=tuple(
            f"{' and '.join(model.served_model.names)}, version {model.registry.state().current}" for model in others
        ),
    )


@contextmanager
def _hold_lease(config: ServeConfig, registry: Registry, owner: str) -> Iterator[bool]:
    """Holds the registry's lease inside the `with` block, or waits for it there while another endpoint holds it; yields
    whether it is held at the start."""
    from serving.registry.lease import Tenant

    tenant = Tenant(registry, owner=owner, url=config.url)
    is_held = tenant.acquire(wait=config.on_lease == "wait", notify=typer.echo)
    try:
        yield is_held
    finally:
        tenant.close()


def _other_database(config: ServeConfig, registry: Registry) -> str | None:
    """A note that keys and feedback of former versions of raylign are in another database; None if there are none."""
    from serving.feedback.store.opening import FILE, old_file

    old = old_file()
    if old is None or config.feedback.database is not None or (registry.folder / FILE).exists():
        return None
    return (
        f"Keys and feedback are kept in {registry.folder / FILE} from now on. Those of before are in {old}; "
        f"feedback.database=sqlite:///{old} goes on with them."
    )


def _is_local() -> bool:
    return "RAY_ADDRESS" not in os.environ


def refuse_busy_port(host: str, port: int) -> None:
    """Checks whether the port can be used, before anything slow starts.

    Raises:
        ServingError: another process listens on it, or the address is not this machine's.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ServingError(
            f"Cannot listen on port {port} of {host}: {error.strerror}. Choose another with port=..., or end the "
            f"process that holds it (`ss -ltnp 'sport = :{port}'` shows which)"
        ) from error


def _raise_on_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _running_ray(config: ServeConfig) -> Iterator[None]:
    """Starts Ray on this machine and stops it afterwards; or connects to the cluster at RAY_ADDRESS.

    Raises:
        ClusterError: no cluster answers there, or it also answers clients without its token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.update(RAY_worker_niceness="0")  # with Ray's default of 15, every other program precedes the engine
    if _is_local():
        # In spite of its name it works on Linux too; without it, Ray replaces 127.0.0.1 by the network address.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    require_token()
    import ray

    try:
        if _is_local():
            ray.init(
                address="local",  # a new Ray, even if `ray start` has run on this machine
                num_cpus=_num_cpus(config),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                # Keeps Ray's own ports off the network. The ports of Serve's replicas are open on all interfaces, but
                # they require the token.
                _node_ip_address="127.0.0.1",
            )
            protect_token_file()
        else:
            _join_ray()
        _raise_on_signals()  # since ray.init installs its own handler
        yield
    finally:
        _ignore_signals()
        ray.shutdown()


def _join_ray() -> None:
    import ray

    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise ClusterError(f"no Ray cluster answers at {os.environ['RAY_ADDRESS']}: {error}") from error
    check_token(ray.get_runtime_context().gcs_address)


def _num_cpus(config: ServeConfig) -> int:
    """The number of CPUs to tell Ray: if the replicas asked for more, Serve would wait for ever, without a message."""
    from serving.app import INGRESS_CPUS, REPLICA_CPUS, SCORING_CPUS

    scoring = sum(SCORING_CPUS * model.rewards.max_replicas for model in config.all_models)
    replicas = sum(model.max_replicas + 1 for model in config.all_models)  # one more, for a canary of whole weights
    return max(len(os.sched_getaffinity(0)), math.ceil(INGRESS_CPUS + scoring + REPLICA_CPUS * replicas))


@contextmanager
def _running_application(
    config: ServeConfig, models: ServedModels[EndpointModel], owner: str
) -> Iterator[dict[ModelId, str]]:
    """Deploys the endpoint; it answers inside the `with` block and is removed after it. Yields the models that did not
    start, and why, if others did.

    Raises:
        ServingError: no engine started.
    """
    from ray import serve

    from serving.app import application, choose_device, deployment_names
    from serving.feedback.store.opening import default_database
    from serving.registry.nodes import check_nodes

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly" if _is_local() else "EveryNode",
        http_options={"host": config.host, "port": config.port},
    )
    _check_address(config)
    name, registry = application_name(models.first.id), models.first.registry
    _check_no_other_application(name)
    check_nodes(registry, config.feedback.database or default_database(registry.folder))
    target = application(config, models, owner)
    devices = " and ".join(dict.fromkeys(choose_device(model.config) for model in models.values()))
    typer.echo(f"Loading the {'model' if len(models) == 1 else 'models'} on {devices} …")
    starting = StartingEndpoint(
        deployment_names={name: deployment_names(models, name) for name in models},
        min_replicas={name: model.config.min_replicas for name, model in models.items()},
        health_url=f"{config.url}/healthz" if _is_local() else None,
    )
    try:
        deploy(target, name, starting)
        yield starting.failures
    finally:
        typer.echo("Stopping when answers in progress have ended; Ctrl-C cuts them off …")
        _delete_application(config, name)


def application_name(model_id: ModelId) -> str:
    """The name of an endpoint's application in Ray Serve. It is unique in a cluster, since Ray Serve replaces an
    application by another one of the same name."""
    return f"{APPLICATION}-{model_id.folder_name}"


def _check_no_other_application(name: str) -> None:
    """Checks that no other application of the cluster has this name, or answers at `/`: ours would replace it.

    Raises:
        ServingError: there is such an application.
    """
    from ray.serve.context import _get_global_client

    for application, details in _get_global_client().get_serve_details()["applications"].items():
        if details["route_prefix"] == "/" or application == name:
            code = f'from ray import serve; serve.delete("{application}")'
            raise ServingError(
                f"The application {application!r} answers on this cluster's Ray Serve already. End it by Ctrl-C where "
                f"it was started, or, if that process has died, by `python -c '{code}'`; or give this endpoint a "
                "cluster of its own"
            )


def _check_address(config: ServeConfig) -> None:
    """Checks that Ray Serve listens on the configured address. If it ran before, it keeps its former address.

    Raises:
        ServingError: it listens on another address.
    """
    from ray.serve.context import _get_global_client

    options = _get_global_client().http_config
    if (options.host, options.port) != (config.host, config.port):
        raise ServingError(
            f"Ray Serve runs on this cluster already and listens on {options.host}:{options.port}, not on "
            f"{config.host}:{config.port}; give host={options.host} port={options.port}, or end it by `serve shutdown`"
        )


def _delete_application(config: ServeConfig, name: str) -> None:
    """Removes the application when its answers in progress have ended, or at once after another signal."""
    from ray import serve

    deadline = time.monotonic() + config.drain_timeout_s
    with suppress(KeyboardInterrupt):
        while True:
            try:
                serve.delete(name)
                return
            except TimeoutError:  # Ray waits for one minute, but an answer may take longer
                if time.monotonic() > deadline:
                    return
