"""Watches an endpoint while Ray Serve starts it: what it still waits for, and which of its models cannot start.

deploy ─► every half second: which deployments failed, what the ingress says of each model ─► it answers, or an error

The only model of an endpoint that cannot start ends the start. One of several does not: the others go on without it.
"""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer

from alignment.errors import ServingError

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

    from serving.registry.model_id import ModelId

LOG_HINT = (
    "Everything that was logged is in /tmp/ray/session_latest/logs of the machine where it happened: serve/ has the "
    "replicas' own, worker-* what vLLM's processes printed."
)
OWN_EXCEPTION = re.compile(r"^\s*(?:alignment|cluster|serving)(?:\.\w+)+: ", re.MULTILINE)
"""The beginning of a line that names one of raylign's own exceptions."""
ANY_EXCEPTION = re.compile(rf"[\w.]+(?:Error|Exception): |{OWN_EXCEPTION.pattern}")
"""The beginning of a line that names any exception."""
POLL_S = 0.5
"""Seconds between two checks of an endpoint that starts."""
PROGRESS_INTERVAL_S = 15.0
"""Seconds of silence after which a line shows that the start goes on."""
INGRESS_TIMEOUT_S = 60.0
"""Seconds in which an ingress must say what the endpoint still waits for."""


@dataclass(frozen=True, kw_only=True)
class StartingEndpoint:
    """An endpoint that starts."""

    deployment_names: Mapping[ModelId, Collection[str]]
    """Names of every model's deployments."""
    min_replicas: Mapping[ModelId, int]
    """Replicas of every model that have to run; a model of which none has to is not waited for."""
    health_url: str | None
    """URL that answers as soon as the proxy on this machine has its routes; None if that is not waited for."""
    failures: dict[ModelId, str] = field(default_factory=dict)
    """Why models did not start that are not waited for any more."""

    def obstacle(self, name: str) -> str:
        """What the start waits for; a blank if that is not known, and empty when the endpoint answers.

        Args:
            name: name of the application in Ray Serve.

        Raises:
            ServingError: the endpoint does not start.
        """
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException
        from ray.serve.schema import ApplicationStatus

        application = serve.status().applications[name]
        self._note_failures(application)
        if not self.failures and application.status != ApplicationStatus.RUNNING:
            return _text_of(application.deployments.values())
        waited_for = [model for model, count in self.min_replicas.items() if count and model not in self.failures]
        try:
            if waited_for:
                handle = serve.get_app_handle(name)
                obstacles = handle.obstacles.remote().result(timeout_s=INGRESS_TIMEOUT_S)
                if obstacle := next(filter(None, (obstacles[model] for model in waited_for)), None):
                    return str(obstacle)
        except (RayError, RayServeException, TimeoutError):
            return "The ingress does not answer yet."
        # The proxy gets its routes a moment after the application runs. In a cluster it may be on another machine.
        return " " if self.health_url is not None and not _is_answering(self.health_url) else ""

    def _note_failures(self, application: ApplicationStatusOverview) -> None:
        """Notes the models that cannot start.

        Raises:
            ServingError: nothing is left to wait for.
        """
        from ray.serve.schema import ApplicationStatus, DeploymentStatus

        for model, names in self.deployment_names.items():
            statuses = {name: application.deployments[name] for name in names if name in application.deployments}
            # A second attempt would end with the same error of raylign's.
            has_failed = any(
                OWN_EXCEPTION.search(status.message) or status.status == DeploymentStatus.DEPLOY_FAILED
                for status in statuses.values()
            )
            if has_failed and model not in self.failures:
                self.failures[model] = _text_of(statuses.values())
                if len(self.failures) < len(self.deployment_names):
                    typer.echo(f"{model} does not start; the endpoint goes on without it. {self.failures[model]}")
        of_models = {name for names in self.deployment_names.values() for name in names}
        others = [status for name, status in application.deployments.items() if name not in of_models]
        # Only an ingress may have an error of ours and be waiting: for its database.
        has_failed_beside_them = application.status == ApplicationStatus.DEPLOY_FAILED and (
            not self.failures or any(status.status == DeploymentStatus.DEPLOY_FAILED for status in others)
        )
        if has_failed_beside_them or len(self.failures) == len(self.deployment_names):
            text = _text_of(application.deployments.values())
            raise ServingError(f"The endpoint did not start. {text}\n{LOG_HINT}")


def deploy(target: Application, name: str, endpoint: StartingEndpoint) -> None:
    """Deploys the endpoint and returns when it answers. Meanwhile it shows progress, and what the start waits for, for
    example a CPU that no machine has.

    Raises:
        ServingError: the endpoint does not start.
    """
    from ray import serve

    serve.run_many([serve.RunTarget(target, name=name, route_prefix="/")], wait_for_applications_running=False)
    start_s = last_output_s = time.monotonic()
    last_message = ""
    while message := endpoint.obstacle(name):
        time_s = time.monotonic()
        if message.strip() and message != last_message:
            typer.echo(message)
            last_message, last_output_s = message, time_s
        elif time_s - last_output_s >= PROGRESS_INTERVAL_S:
            typer.echo(f"… {time_s - start_s:.0f} s")
            last_output_s = time_s
        time.sleep(POLL_S)


def _text_of(deployments: Iterable[DeploymentStatusOverview]) -> str:
    """What Ray Serve says of deployments; a blank if it says nothing."""
    messages = (status.message for status in deployments if status.message.strip())
    return "\n".join(map(exception_text, messages)) or " "


def exception_text(text: str) -> str:
    """The exception at the end of a traceback (one of raylign's without its name), or else the first line."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    line_numbers = [number for number, line in enumerate(lines) if ANY_EXCEPTION.match(line)]
    gist = " ".join(lines[line_numbers[-1] :]) if line_numbers else lines[0]
    return OWN_EXCEPTION.sub("", gist).partition(" [type=")[0]  # after that, pydantic prints the whole input


def _is_answering(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
