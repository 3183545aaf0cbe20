"""One scrape of `/metrics` returns what all ingresses have counted.

scrape ─► any ingress ─► its own metrics, and those of the others, which have a second to answer ─► one page

Each process counts for itself, and a load balancer asks one of them. Without the others' metrics, every counter would
jump between theirs. The ingress that is asked gathers them (`DeploymentHandle.broadcast`), so that no other process has
to run, and nothing is written. What an ingress counted after its last scrape is lost when it ends.

One method of Ray that is not public is used here alone: `DeploymentBroadcastResponse._fetch_replica_results_async`. It
returns one result for each replica. The public `results_async` drops all answers when one replica does not answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from serving.http.metrics import merge
from serving.registry.state import State

ANSWER_S = 1.0
"""Seconds that an ingress has to answer."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True)
class IngressMetrics:
    """The metrics of one ingress."""

    ingress: str
    """Name of its replica in Ray Serve."""
    metrics: list[Metric]


@dataclass(frozen=True, kw_only=True)
class GatheredMetrics:
    """The metrics of all ingresses that answered."""

    answers: tuple[IngressMetrics, ...]
    num_unreachable: int
    """Number of ingresses that did not answer."""


async def gather(ingresses: DeploymentHandle) -> GatheredMetrics:
    """Asks all ingresses for their metrics, and returns the answers that came within `ANSWER_S`."""
    deadline = asyncio.get_running_loop().time() + ANSWER_S
    try:
        async with asyncio.timeout_at(deadline):
            results = await ingresses.broadcast("own_metrics")._fetch_replica_results_async()
    except DeploymentUnavailableError:  # this ingress knows of no other one yet
        return GatheredMetrics(answers=(), num_unreachable=0)
    except (RayError, RayServeException, TimeoutError):
        logger.warning("An ingress could not ask the others for their figures")
        return GatheredMetrics(answers=(), num_unreachable=1)
    tasks = [asyncio.ensure_future(result.get_async()) for result in results]
    if tasks:
        await asyncio.wait(tasks, timeout=deadline - asyncio.get_running_loop().time())
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    answers = tuple(outcome for outcome in outcomes if isinstance(outcome, IngressMetrics))
    return GatheredMetrics(answers=answers, num_unreachable=len(outcomes) - len(answers))


def page(
    own_metrics: IngressMetrics,
    gathered_metrics: GatheredMetrics,
    states: Mapping[str, State],
    *,
    records_waiting: int,
    audit_waiting: int,
) -> list[Metric]:
    """Returns all metrics: those of every ingress, and those of the service as a whole, which every ingress knows.

    Args:
        own_metrics: metrics of the ingress that was asked.
        gathered_metrics: metrics of all ingresses; those of the ingress that was asked may be missing.
        states: which versions of each model answer, by the model's name.
        records_waiting: number of answers that wait in files for the database.
        audit_waiting: number of entries of the audit trail that wait in files for the database.
    """
    metrics_by_ingress = {answer.ingress: answer.metrics for answer in (*gathered_metrics.answers, own_metrics)}
    current = GaugeMetricFamily("raylign_version", "Number of the current version", labels=("model",))
    canary = GaugeMetricFamily(
        "raylign_canary_share", "Share of the conversations on trial", labels=("model", "version")
    )
    for model, state in states.items():
        current.add_metric((model,), state.current)
        if state.canary is not None:
            canary.add_metric((model, str(state.canary)), state.share)
    return [
        *merge(metrics_by_ingress),
        current,
        canary,
        GaugeMetricFamily("raylign_records_waiting", "Answers that wait in files for the database", records_waiting),
        GaugeMetricFamily(
            "raylign_audit_waiting", "Entries of the audit trail that wait in files for the database", audit_waiting
        ),
        GaugeMetricFamily("raylign_ingresses", "Ingresses whose figures these are", len(metrics_by_ingress)),
        GaugeMetricFamily(
            "raylign_ingresses_unreachable",
            "Ingresses that did not tell their figures",
            gathered_metrics.num_unreachable,
        ),
    ]
