"""One scrape of `/metrics` tells what all ingresses have counted.

scrape ─► any ingress ─► its own figures, and those of the others, which have a second to answer ─► one page

Each process counts for itself, and a load balancer asks one of them: without the others' figures, every counter would
jump between theirs. Whoever is asked gathers them (`DeploymentHandle.broadcast`), so that no further process has to
live, and nothing is written anywhere. What an ingress counted after the last scrape before it ended is lost with it.

Not public in Ray, and used here alone: `DeploymentBroadcastResponse._fetch_replica_results_async`, one result for each
replica. The public `results_async` forgets what the others said when one of them does not answer.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from serving.meters import merged
from serving.registry import State

ANSWER_S = 1.0
"""Seconds that an ingress has for its figures."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one ingress has counted."""

    ingress: str
    """Its replica's name in Ray Serve."""
    metrics: list[Metric]


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What could be learned from all of them."""

    answers: tuple[Figures, ...]
    num_unreachable: int


async def gather(ingresses: DeploymentHandle) -> Gathered:
    """What the ingresses have counted, as far as they say so within `ANSWER_S`."""
    deadline = asyncio.get_running_loop().time() + ANSWER_S
    try:
        async with asyncio.timeout_at(deadline):
            results = await ingresses.broadcast("figures")._fetch_replica_results_async()
    except DeploymentUnavailableError:  # none is known yet
        return Gathered(answers=(), num_unreachable=0)
    except (RayError, RayServeException, TimeoutError):
        logger.warning("An ingress could not ask the others for their figures")
        return Gathered(answers=(), num_unreachable=1)
    asking = [asyncio.ensure_future(result.get_async()) for result in results]
    if asking:
        await asyncio.wait(asking, timeout=deadline - asyncio.get_running_loop().time())
    for task in asking:
        task.cancel()
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    answers = tuple(outcome for outcome in outcomes if isinstance(outcome, Figures))
    return Gathered(answers=answers, num_unreachable=len(outcomes) - len(answers))


def page(own: Figures, gathered: Gathered, state: State, *, records_waiting: int, audit_waiting: int) -> list[Metric]:
    """All metrics: of every ingress, and of the service as a whole, which any of them knows.

    Args:
        own: of the ingress that was asked.
        gathered: of all, itself among them or not.
        state: which versions answer.
        records_waiting: answers that wait in files for the database.
        audit_waiting: entries of the audit trail that do.
    """
    figures = {answer.ingress: answer.metrics for answer in (*gathered.answers, own)}
    canary = GaugeMetricFamily("raylign_canary_share", "Share of the conversations on trial", labels=("version",))
    if state.canary is not None:
        canary.add_metric((str(state.canary),), state.share)
    return [
        *merged(figures),
        GaugeMetricFamily("raylign_version", "Number of the current version", state.current),
        canary,
        GaugeMetricFamily("raylign_records_waiting", "Answers that wait in files for the database", records_waiting),
        GaugeMetricFamily(
            "raylign_audit_waiting", "Entries of the audit trail that wait in files for the database", audit_waiting
        ),
        GaugeMetricFamily("raylign_ingresses", "Ingresses whose figures these are", len(figures)),
        GaugeMetricFamily(
            "raylign_ingresses_unreachable", "Ingresses that did not tell their figures", gathered.num_unreachable
        ),
    ]
