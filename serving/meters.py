"""What Prometheus can read of the service at `/metrics`: what one ingress counts, and how the figures of all are told.

Every series of an ingress bears its replica's name in the label `ingress`. A sum over the ingresses without it would
fall whenever one of them ends, which Prometheus takes for a counter that began anew: it would count all that the others
have counted a second time. Each series by itself never falls, and one that ends only ends: `sum without (ingress)
(rate(…))` is right whichever ingress is asked, and however many there are. Labels have few values: never what a client
sends, as a path or the name of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from prometheus_client.metrics_core import Metric

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Upper bounds of the histograms' buckets."""
NONE = "none"
"""The version of what no model answered, and the route of what leads to none."""
METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")
JUDGEMENTS = ("choice", "thumb", "ranking", "correction")
FORM_REASONS = ("error", "time", "memory", "crash", "busy")
LOSS_REASONS = ("refused", "too many wait", "no file", "not read")


class Meters:
    """The figures of one ingress."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        by = ("route", "version")
        self._requests = Counter(
            "raylign_requests_total", "Requests, however they ended", (*by, "method", "status"), registry=registry
        )
        self._in_progress = Gauge(
            "raylign_requests_in_progress", "Requests that are not answered yet", ("route",), registry=registry
        )
        self._waiting = Gauge("raylign_requests_waiting", "Requests that wait", ("on",), registry=registry)
        self._seconds = Histogram(
            "raylign_request_seconds",
            "Until the end of an answer with a status below 400",
            by,
            buckets=SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            "raylign_first_token_seconds", "Until a stream's first text", by, buckets=SECONDS, registry=registry
        )
        self._broken = Counter(
            "raylign_streams_broken_total",
            "Answers that had begun and broke off",
            (*by, "reason"),
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "raylign_prompt_tokens_total", "Tokens of prompts of whole answers", ("version",), registry=registry
        )
        self._completion_tokens = Counter(
            "raylign_completion_tokens_total", "Tokens of whole answers", ("version",), registry=registry
        )
        self._rated = Counter(
            "raylign_rated_completions_total", "Completions that were given a reward", ("version",), registry=registry
        )
        self._judgements = Counter("raylign_judgements_total", "What people said", ("kind",), registry=registry)
        self._forms = Counter(
            "raylign_forms_refused_total",
            "Forms of answers that could not be compiled on trial",
            ("reason",),
            registry=registry,
        )
        self._lost = Counter(
            "raylign_records_lost_total", "Answers that could not be stored", ("reason",), registry=registry
        )
        self._audit_lost = Counter(
            "raylign_audit_lost_total", "Entries of the audit trail that only the log has", registry=registry
        )
        self._parts = Summary(
            "raylign_part_seconds", "What the endpoint adds to an answer", ("part",), registry=registry
        )
        for counter, values in (
            (self._judgements, JUDGEMENTS),
            (self._forms, FORM_REASONS),
            (self._lost, LOSS_REASONS),
        ):
            for value in values:  # at 0: an alarm that has never been rung has to be seen to be there
                counter.labels(value)

    @contextmanager
    def in_progress(self, route: str) -> Iterator[None]:
        """Counts a request as one in progress for as long as the block lasts."""
        gauge = self._in_progress.labels(route)
        gauge.inc()
        try:
            yield
        finally:
            gauge.dec()

    def waits(self, on: str, num_waiting: Callable[[], int]) -> None:
        """Has it asked, whenever figures are told, how many requests wait on the `engine` or others of their `key`."""
        self._waiting.labels(on).set_function(num_waiting)

    def answered(self, route: str, *, method: str, status: int, version: str | None, seconds: float) -> None:
        """Counts a request that has ended. `status` 499 is one whose client went away before it was answered."""
        known = method if method in METHODS else "other"
        self._requests.labels(route, version or NONE, known, str(status)).inc()
        if status < 400:
            self._seconds.labels(route, version or NONE).observe(seconds)

    def broke_off(self, route: str, *, version: str | None, reason: str) -> None:
        """Counts an answer that had begun and did not come to its end."""
        self._broken.labels(route, version or NONE, reason).inc()

    def first_token(self, route: str, version: str | None, seconds: float) -> None:
        """Counts a stream whose first text is there."""
        self._first.labels(route, version or NONE).observe(seconds)

    def generated(self, version: str | None, usage: Mapping[str, Any] | None) -> None:
        """Counts the tokens of a whole answer, by its `usage` as in OpenAI's protocol; one that broke off has none."""
        if usage:
            self._prompt_tokens.labels(version or NONE).inc(usage["prompt_tokens"])
            self._completion_tokens.labels(version or NONE).inc(usage.get("completion_tokens") or 0)

    def rated(self, version: int, num_completions: int) -> None:
        """Counts completions that were given a reward."""
        self._rated.labels(str(version)).inc(num_completions)

    def took(self, part: str, seconds: float) -> None:
        """Counts what a part of the endpoint took: `key`, `body`, `version`, `form` or `record`."""
        self._parts.labels(part).observe(seconds)

    def judged(self, kind: str) -> None:
        """Counts a judgement."""
        self._judgements.labels(kind).inc()

    def form_refused(self, reason: str) -> None:
        """Counts a form of answers that could not be compiled on trial."""
        self._forms.labels(reason).inc()

    def record_lost(self, reason: str) -> None:
        """Counts an answer that was given and could not be stored."""
        self._lost.labels(reason).inc()

    def audit_lost(self) -> None:
        """Counts an entry of the audit trail that could not be written."""
        self._audit_lost.inc()

    def figures(self) -> list[Metric]:
        """All of it, in a form that goes to other processes."""
        metrics = list(self._registry.collect())
        for metric in metrics:
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
        return metrics


def merged(figures: Mapping[str, Sequence[Metric]]) -> list[Metric]:
    """The figures of several ingresses, each by its name, as one list in which every series says whose it is."""
    families: dict[str, Metric] = {}
    for ingress, metrics in figures.items():
        for metric in metrics:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [
                sample._replace(labels={**sample.labels, "ingress": ingress}) for sample in metric.samples
            ]
    return list(families.values())


class _Families:
    """What `generate_latest` takes."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Sequence[Metric]:
        return self._metrics


def exposition(metrics: Sequence[Metric]) -> bytes:
    """Metrics in Prometheus' text format."""
    return generate_latest(_Families(metrics))
