"""The page of what runs and endpoints measure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric

from docs.generate.metric_meanings import SECTIONS
from docs.generate.text import NOTICE, item, page_text
from serving.http.metrics import Metrics
from serving.http.scrape import GatheredMetrics, IngressMetrics, page
from serving.registry.state import State


def metrics_page() -> str:
    """What runs and endpoints measure."""
    blocks = [
        "# Metrics",
        NOTICE,
        "## Of a run",
        "In `runs/NAME/metrics.jsonl`, one line per step, and in what `trackers` names: by default "
        "`runs/NAME/tensorboard`. Step 0 is the untrained model. A metric is a mean over the step, of all workers "
        "together, unless it says otherwise.",
    ]
    for title, meanings in SECTIONS.items():
        blocks += [f"### {title}", "\n".join(item(name, [], meaning) for name, meaning in meanings.items())]
    blocks += [
        "## Of an endpoint",
        "At `GET /metrics`, in Prometheus' text format. [Metrics](../metrics.md) explains how to scrape, and has "
        "questions and alarms. What an ingress counts has the label `ingress` too.",
        "\n".join(sorted(_endpoint_metrics())),
    ]
    return page_text(blocks)


def _endpoint_metrics() -> Iterator[str]:
    for collector in vars(Metrics()).values():
        if isinstance(collector, MetricWrapperBase):
            (family,) = collector.describe()
            yield _metric(family, collector._labelnames)  # no public name tells the labels of what was not counted yet
    state = State(current=1, canary=2, share=0.1)
    own_metrics = IngressMetrics(ingress="ingress", metrics=[])
    answers = GatheredMetrics(answers=(), num_unreachable=0)
    families = page(own_metrics, answers, {"assistant": state}, records_waiting=0, audit_waiting=0)
    yield from (_metric(family, family.samples[0].labels) for family in families)


def _metric(family: Metric, labels: Iterable[str]) -> str:
    name = f"{family.name}_total" if family.type == "counter" else family.name
    label_text = ", ".join(f"`{label}`" for label in labels)
    return item(name, [family.type, *([f"by {label_text}"] if label_text else [])], f"{family.documentation}.")
