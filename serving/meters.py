"""What Prometheus can read of the service at `/metrics`, by route and by model version."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest

from serving.schema import Reply

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Upper bounds of the histograms' buckets."""


class Meters:
    """The figures of one ingress."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        by = ("route", "version")
        self._requests = Counter(
            "raylign_requests", "Requests that were answered", (*by, "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "raylign_request_seconds", "Until the whole answer", by, buckets=SECONDS, registry=self._registry
        )
        self._first = Histogram(
            "raylign_first_token_seconds", "Until a stream's first text", by, buckets=SECONDS, registry=self._registry
        )
        self._judgements = Counter("raylign_judgements", "What people said", ("kind",), registry=self._registry)
        self._lost = Counter(
            "raylign_records_lost", "Answers that could not be stored", ("reason",), registry=self._registry
        )
        self._waiting = Gauge(
            "raylign_records_waiting", "Answers that wait in files for the database", registry=self._registry
        )
        self._parts = Summary(
            "raylign_part_seconds", "What the endpoint adds to an answer", ("part",), registry=self._registry
        )
        self._version = Gauge("raylign_version", "Number of the current version", registry=self._registry)

    def answered(self, route: str, reply: Reply, seconds: float) -> None:
        """Counts a request whose answer is complete."""
        version = reply.version or "none"
        self._requests.labels(route, version, str(reply.status)).inc()
        self._seconds.labels(route, version).observe(seconds)

    def first_token(self, route: str, reply: Reply, seconds: float) -> None:
        """Counts a stream whose first text is there."""
        self._first.labels(route, reply.version or "none").observe(seconds)

    def took(self, part: str, seconds: float) -> None:
        """Counts what a part of the endpoint took: `key`, `body`, `version` or `record`."""
        self._parts.labels(part).observe(seconds)

    def judged(self, kind: str) -> None:
        """Counts a judgement."""
        self._judgements.labels(kind).inc()

    def record_lost(self, reason: str) -> None:
        """Counts an answer that was given and could not be stored."""
        self._lost.labels(reason).inc()

    def text(self, version: int, *, records_waiting: int) -> bytes:
        """Everything, in Prometheus' format.

        Args:
            version: number of the current version.
            records_waiting: answers that wait for the database.
        """
        self._version.set(version)
        self._waiting.set(records_waiting)
        return generate_latest(self._registry)
