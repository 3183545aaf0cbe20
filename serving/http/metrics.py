"""The metrics of the service, for Prometheus at `/metrics`: what one ingress counts, and how those of all are joined.

Every series of an ingress has its replica's name in the label `ingress`. A sum over the ingresses without this label
would fall whenever one of them ends. Prometheus takes a fall for a counter that began again, and would count a second
time what the other ingresses have counted. A single series never falls, and the series of an ingress that ends only
ends: `sum without (ingress) (rate(…))` is right whichever ingress is asked, and however many there are. Labels have few
values, and never what a client sends, as a path or the name of a key.
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
"""The model and the version of requests that no model answered, and the route of paths that no route has."""
METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")
FEEDBACK_KINDS = ("choice", "thumb", "ranking", "correction")
FORM_REASONS = ("error", "time", "memory", "crash", "busy")
LOSS_REASONS = ("refused", "too many wait", "no file", "not read")


class Metrics:
    """The metrics of one ingress."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        labels = ("route", "model", "version")
        self._requests = Counter(
            "raylign_requests_total", "Requests, however they ended", (*labels, "method", "status"), registry=registry
        )
        self._in_progress = Gauge(
            "raylign_requests_in_progress", "Requests that are not answered yet", ("route",), registry=registry
        )
        self._waiting_requests = Gauge("raylign_requests_waiting", "Requests that wait", ("on",), registry=registry)
        self._seconds = Histogram(
            "raylign_request_seconds",
            "Until the end of an answer with a status below 400",
            labels,
            buckets=SECONDS,
            registry=registry,
        )
        self._first_token = Histogram(
            "raylign_first_token_seconds", "Until a stream's first text", labels, buckets=SECONDS, registry=registry
        )
        self._broken_streams = Counter(
            "raylign_streams_broken_total",
            "Answers that had begun and broke off",
            (*labels, "reason"),
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "raylign_prompt_tokens_total", "Tokens of prompts of whole answers", ("model", "version"), registry=registry
        )
        self._completion_tokens = Counter(
            "raylign_completion_tokens_total", "Tokens of whole answers", ("model", "version"), registry=registry
        )
        self._scored_completions = Counter(
            "raylign_rated_completions_total",
            "Completions that were given a reward",
            ("model", "version"),
            registry=registry,
        )
        self._feedback = Counter("raylign_judgements_total", "What people said", ("kind",), registry=registry)
        self._refused_forms = Counter(
            "raylign_forms_refused_total",
            "Forms of answers that could not be compiled on trial",
            ("reason",),
            registry=registry,
        )
        self._lost_records = Counter(
            "raylign_records_lost_total", "Answers that could not be stored", ("reason",), registry=registry
        )
        self._lost_audit_entries = Counter(
            "raylign_audit_lost_total", "Entries of the audit trail that only the log has", registry=registry
        )
        self._stages = Summary(
            "raylign_part_seconds", "What the endpoint adds to an answer", ("part",), registry=registry
        )
        for counter, values in (
            (self._feedback, FEEDBACK_KINDS),
            (self._refused_forms, FORM_REASONS),
            (self._lost_records, LOSS_REASONS),
        ):
            for value in values:  # they begin at 0, so that people see that there is such a counter
                counter.labels(value)

    @contextmanager
    def in_progress(self, route: str) -> Iterator[None]:
        """Counts a request as one in progress while the block lasts."""
        gauge = self._in_progress.labels(route)
        gauge.inc()
        try:
            yield
        finally:
            gauge.dec()

    def track_waiting(self, resource: str, num_waiting: Callable[[], int]) -> None:
        """Sets the function that says how many requests wait on the `engine`, or on others of their `key`."""
        self._waiting_requests.labels(resource).set_function(num_waiting)

    def count_request(
        self,
        route: str,
        *,
        method: str,
        status: int,
        version: str | None,
        seconds: float,
        model: str | None = None,
    ) -> None:
        """Counts a request that has ended. The status 499 means that the client went away before it was answered.

        Args:
            model: name of the model that the request was about; None if it was about none.
        """
        method_label = method if method in METHODS else "other"
        labels = (route, model or NONE, version or NONE)
        self._requests.labels(*labels, method_label, str(status)).inc()
        if status < 400:
            self._seconds.labels(*labels).observe(seconds)

    def count_broken_stream(self, route: str, *, version: str | None, reason: str, model: str | None = None) -> None:
        """Counts an answer that has begun and did not come to its end."""
        self._broken_streams.labels(route, model or NONE, version or NONE, reason).inc()

    def observe_first_token(self, route: str, version: str | None, seconds: float, *, model: str | None = None) -> None:
        """Counts the seconds until a stream's first text."""
        self._first_token.labels(route, model or NONE, version or NONE).observe(seconds)

    def count_tokens(self, version: str | None, usage: Mapping[str, Any] | None, *, model: str | None = None) -> None:
        """Counts the tokens of a whole answer by OpenAI's `usage`; a stream that broke off has none."""
        if usage:
            labels = (model or NONE, version or NONE)
            self._prompt_tokens.labels(*labels).inc(usage["prompt_tokens"])
            self._completion_tokens.labels(*labels).inc(usage.get("completion_tokens") or 0)

    def count_scored(self, version: int, num_completions: int, *, model: str | None = None) -> None:
        """Counts completions that were given a reward."""
        self._scored_completions.labels(model or NONE, str(version)).inc(num_completions)

    def observe(self, stage: str, seconds: float) -> None:
        """Counts the seconds of a stage of the endpoint: `key`, `body`, `version`, `form` or `record`."""
        self._stages.labels(stage).observe(seconds)

    def count_feedback(self, kind: str) -> None:
        """Counts feedback of a kind."""
        self._feedback.labels(kind).inc()

    def count_refused_form(self, reason: str) -> None:
        """Counts a form of answers that could not be compiled on trial."""
        self._refused_forms.labels(reason).inc()

    def count_lost_record(self, reason: str) -> None:
        """Counts an answer that was given and could not be stored."""
        self._lost_records.labels(reason).inc()

    def count_lost_audit_entry(self) -> None:
        """Counts an entry of the audit trail that could not be written."""
        self._lost_audit_entries.inc()

    def collect(self) -> list[Metric]:
        """Returns all metrics in a form that can be sent to other processes."""
        metrics = list(self._registry.collect())
        for metric in metrics:
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
        return metrics


def merge(metrics_by_ingress: Mapping[str, Sequence[Metric]]) -> list[Metric]:
    """Returns the metrics of several ingresses as one list, in which every series has the label `ingress`."""
    families: dict[str, Metric] = {}
    for ingress, metrics in metrics_by_ingress.items():
        for metric in metrics:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [
                sample._replace(labels={**sample.labels, "ingress": ingress}) for sample in metric.samples
            ]
    return list(families.values())


class _Families:
    """A collector, as `generate_latest` takes it."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Sequence[Metric]:
        """Returns the metrics."""
        return self._metrics


def exposition(metrics: Sequence[Metric]) -> bytes:
    """Returns metrics in Prometheus' text format."""
    return generate_latest(_Families(metrics))
