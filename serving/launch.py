"""`raylign serve`: from a checkpoint to an answering endpoint, and down again without a trace."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignment.errors import ClusterError, ServingError
from cluster.ray_access import check_token, protect_token_file, require_token

if TYPE_CHECKING:
    from ray.serve import Application

    from serving.config import ServeConfig
    from serving.registry import Registry
    from serving.served import Served

APPLICATION = "raylign"
LOGS = (
    "Everything that was logged is in /tmp/ray/session_latest/logs of the machine where it happened: serve/ has the "
    "replicas' own, worker-* what vLLM's processes printed."
)
OURS = re.compile(r"^\s*(?:alignment|cluster|serving)(?:\.\w+)+: ", re.MULTILINE)
"""How a line begins that names an exception of ours."""
RAISED = re.compile(rf"[\w.]+(?:Error|Exception): |{OURS.pattern}")
"""The same of any exception."""
POLL_S = 0.5
"""Seconds between looks at an endpoint that starts."""
SIGN_OF_LIFE_S = 15.0
ANSWER_S = 60.0
"""Seconds in which an ingress says whether an answer has been drawn."""
OBJECT_STORE_BYTES = 200 * 2**20  # only requests and answers pass through; Ray would take 30 % of the memory


def serve(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A run's folder, a checkpoint, a model or adapter folder, a hub id, or smollm2-135m-instruct."
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
    """Serve a checkpoint behind an OpenAI-compatible HTTP endpoint, until Ctrl-C.

    What was served last under the same name goes on being served: CHECKPOINT then only becomes a version to promote.
    A LoRA checkpoint is served together with its base model: requests choose by the name they give as `model`.
    Ray is started on this machine; with RAY_ADDRESS set, the endpoint is deployed on that cluster instead.
    """
    from serving.config import load_serve_config

    started = time.monotonic()
    _raise_on_signals()
    try:
        settings = [*(overrides or []), *(["promote=true"] if promote else [])]
        with endpoint(load_serve_config(checkpoint, settings, config)) as running:
            typer.echo(f"Ready after {time.monotonic() - started:.0f} s. {running}")
            threading.Event().wait()
    except KeyboardInterrupt:
        typer.echo("Stopped.")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A running endpoint."""

    url: str
    """As `http://127.0.0.1:8000`; OpenAI's clients want `/v1` behind it."""
    names: list[str]
    """The model names it answers to, the aligned model first."""
    version: int
    """Number of the version that answers."""
    keys: bool
    """Whether requests need a key."""
    can_chat: bool = True
    """Whether the model has a template for chats."""
    is_asleep: bool = False
    """Whether nothing is loaded before the first request."""

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
        key = " -H 'Authorization: Bearer KEY'" if self.keys else ""
        how = (
            f" with a KEY from `raylign keys create`; its page is {self.url}/"
            if self.keys
            else f"; its page is {self.url}/"
        )
        return (
            f"{self.url}/v1 serves {' and '.join(self.names)}, version {self.version}{how}.{note} Try: "
            f"curl {self.url}/v1/{route}{key} -H 'Content-Type: application/json' -d '{body}'"
        )


@contextmanager
def endpoint(config: ServeConfig) -> Iterator[Endpoint]:
    """An endpoint that answers inside the `with` block, and is gone after it.

    Raises:
        ServingError: the port is taken, another endpoint has the registry, or the engine did not start.
        CheckpointError, ModelError: the checkpoint cannot be served (see `serving.served.publish`).
    """
    from serving.served import publish, registry_of

    if _is_local():
        refuse_busy_port(config.host, config.port)
    owner = f"{secrets.token_hex(8)}/{APPLICATION}"
    with _leased(config, registry_of(config), owner) as is_held:
        publication = publish(config if is_held else config.model_copy(update={"promote": False}), is_live=not is_held)
        served = publication.served
        if publication.note:
            typer.echo(publication.note)
        if note := _other_database(config, publication.registry):
            typer.echo(note)
        doing = "Starting Ray" if _is_local() else f"Connecting to Ray at {os.environ['RAY_ADDRESS']}"
        typer.echo(f"{doing} to serve {' and '.join(served.names)} …")
        with _ray(config), _application(config, served, publication.registry, owner):
            yield Endpoint(
                url=config.url,
                names=served.names,
                version=publication.registry.state().current,
                keys=not config.no_keys,
                can_chat=served.can_chat,
                is_asleep=not config.min_replicas,
            )


@contextmanager
def _leased(config: ServeConfig, registry: Registry, owner: str) -> Iterator[bool]:
    """The registry belongs to this endpoint, or will when the other one has ended; whether it does already."""
    from serving.lease import Tenant

    tenant = Tenant(registry, owner=owner, url=config.url)
    is_held = tenant.acquire(wait=config.on_lease == "wait", notify=typer.echo)
    try:
        yield is_held
    finally:
        tenant.close()


def _other_database(config: ServeConfig, registry: Registry) -> str | None:
    """That keys and feedback of before lie elsewhere, where this endpoint begins new ones; None if they do not."""
    from serving.store.opening import FILE, old_file

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
    """Finds out before anything heavy starts whether the port can be listened on.

    Raises:
        ServingError: another process listens there, or the address is not this machine's.
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
def _ray(config: ServeConfig) -> Iterator[None]:
    """A Ray of our own on this machine, gone afterwards; or a connection to the cluster at RAY_ADDRESS.

    Raises:
        ClusterError: no cluster answers there, or it answers those who have not its token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.update(RAY_worker_niceness="0")  # Ray's default of 15 lets every other program go before the engine
    if _is_local():
        # Works on Linux too, whatever its name says: without it, Ray replaces 127.0.0.1 by the outside address.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    require_token()
    import ray

    try:
        if _is_local():
            ray.init(
                address="local",  # not that of a `ray start` on this machine
                num_cpus=_num_cpus(config),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                # Keeps Ray's own ports off the network; those of Serve's replicas are on all interfaces, and want the
                # token.
                _node_ip_address="127.0.0.1",
            )
            protect_token_file()
        else:
            _join_ray()
        _raise_on_signals()  # ray.init installs a handler of its own
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
    """CPUs that Ray shall believe in: with fewer than the replicas ask for, Serve would wait forever, silently."""
    from serving.app import INGRESS_CPUS, REPLICA_CPUS, SCORING_CPUS

    scoring = SCORING_CPUS * config.rewards.max_replicas
    replicas = config.max_replicas + 1  # the further one holds a canary of whole weights
    return max(len(os.sched_getaffinity(0)), math.ceil(INGRESS_CPUS + scoring + REPLICA_CPUS * replicas))


@contextmanager
def _application(config: ServeConfig, served: Served, registry: Registry, owner: str) -> Iterator[None]:
    """The deployed endpoint, answering; taken down afterwards.

    Raises:
        ServingError: the engine did not start.
    """
    from ray import serve

    from serving.app import application, choose_device
    from serving.nodes import check_nodes
    from serving.store.opening import default_database

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly" if _is_local() else "EveryNode",
        http_options={"host": config.host, "port": config.port},
    )
    _check_address(config)
    name = application_name(served)
    _refuse_second(name)
    check_nodes(registry, config.feedback.database or default_database(registry.folder))
    target = application(config, served, registry, owner)
    typer.echo(f"Loading the model on {choose_device(config)} …")
    try:
        _deploy(target, config, name)
        yield
    finally:
        typer.echo("Stopping when answers in progress have ended; Ctrl-C cuts them off …")
        _delete(config, name)


def application_name(served: Served) -> str:
    """What Ray Serve calls an endpoint: no two of a cluster alike, so that none is taken for another and replaced."""
    return f"{APPLICATION}-{served.name.replace('/', '--')}"


def _refuse_second(name: str) -> None:
    """One application of a cluster answers at `/`; another one would replace it, if only by its name.

    Raises:
        ServingError: there is one.
    """
    from ray.serve.context import _get_global_client

    for other, details in _get_global_client().get_serve_details()["applications"].items():
        if details["route_prefix"] == "/" or other == name:
            code = f'from ray import serve; serve.delete("{other}")'
            raise ServingError(
                f"The application {other!r} answers on this cluster's Ray Serve already. End it by Ctrl-C where it was "
                f"started, or, if that process has died, by `python -c '{code}'`; or give this endpoint a cluster of "
                "its own"
            )


def _check_address(config: ServeConfig) -> None:
    """A Ray Serve that ran already goes on listening where it did.

    Raises:
        ServingError: that is another address than the configured one.
    """
    from ray.serve.context import _get_global_client

    options = _get_global_client().http_config
    if (options.host, options.port) != (config.host, config.port):
        raise ServingError(
            f"Ray Serve runs on this cluster already and listens on {options.host}:{options.port}, not on "
            f"{config.host}:{config.port}; give host={options.host} port={options.port}, or end it by `serve shutdown`"
        )


def _delete(config: ServeConfig, name: str) -> None:
    """Takes the application down; another signal ends the waiting for what it still answers."""
    from ray import serve

    deadline = time.monotonic() + config.drain_timeout_s
    with suppress(KeyboardInterrupt):
        while True:
            try:
                serve.delete(name)
                return
            except TimeoutError:  # Ray waits for a minute, however long an answer may take
                if time.monotonic() > deadline:
                    return


def _deploy(target: Application, config: ServeConfig, name: str) -> None:
    """Returns when the endpoint has answered; shows meanwhile that time passes, and what is waited for, such as a CPU
    that no machine has.

    Raises:
        ServingError: it does not start.
    """
    from ray import serve

    serve.run_many([serve.RunTarget(target, name=name, route_prefix="/")], wait_for_applications_running=False)
    started = said_at = time.monotonic()
    said = ""
    while text := _obstacle(config, name):
        now = time.monotonic()
        if text.strip() and text != said:
            typer.echo(text)
            said, said_at = text, now
        elif now - said_at >= SIGN_OF_LIFE_S:
            typer.echo(f"… {now - started:.0f} s")
            said_at = now
        time.sleep(POLL_S)


def _obstacle(config: ServeConfig, name: str) -> str:
    """What the endpoint waits for, blank if nobody says; empty when it has answered.

    Raises:
        ServingError: it does not start.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException
    from ray.serve.schema import ApplicationStatus

    from serving.app import INGRESS_NAME

    application = serve.status().applications[name]
    messages = {part: status.message for part, status in application.deployments.items() if status.message.strip()}
    text = "\n".join(map(_gist, messages.values())) or " "
    # What our own errors say would be the same a second time. An ingress may only wait for its database.
    is_final = any(OURS.search(message) for part, message in messages.items() if part != INGRESS_NAME)
    if is_final or application.status == ApplicationStatus.DEPLOY_FAILED:
        raise ServingError(f"The endpoint did not start. {text}\n{LOGS}")
    if application.status != ApplicationStatus.RUNNING:
        return text
    try:
        if config.min_replicas and (told := serve.get_app_handle(name).obstacle.remote().result(timeout_s=ANSWER_S)):
            return str(told)
    except (RayError, RayServeException, TimeoutError):
        return "The ingress does not answer yet."
    # The proxy learns its routes a moment after the application runs. Of a cluster, it may be on another machine.
    return " " if _is_local() and not _answers(f"{config.url}/healthz") else ""


def _gist(text: str) -> str:
    """The exception at the end of a traceback, of ours without its name, else the first line."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    raised = [place for place, line in enumerate(lines) if RAISED.match(line)]
    gist = " ".join(lines[raised[-1] :]) if raised else lines[0]
    return OURS.sub("", gist).partition(" [type=")[0]  # where pydantic begins to print the whole input


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
