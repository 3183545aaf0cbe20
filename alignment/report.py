"""A run as one self-contained HTML page: its curves, its figures, and what the model says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from alignment.errors import ConfigError
from alignment.metrics import read_metrics

PAGE = "report.html"
# Title, then the metrics that share its axes: (metric, legend).
CHARTS = (
    ("Reward", (("reward", "training"), ("eval/reward", "held out"))),
    ("Divergence from the reference, nats per answer", (("kl", "training"), ("eval/kl", "held out"))),
    ("Entropy, nats per token", (("entropy", "training"),)),
    ("Tokens per answer", (("completions/mean_length", "training"), ("eval/length", "held out"))),
    ("Judge: keywords", (("eval/judges/keywords", "held out"),)),
    ("Trainer against sampler, mean |Δ log π|", (("mismatch/mean_abs", "training"),)),
    ("Value loss", (("value_loss", "training"),)),
    ("Loss", (("loss", "training"), ("eval/loss", "held out"))),
    (
        "Margin: implicit reward of chosen minus rejected",
        (("rewards/margins", "training"), ("eval/rewards/margins", "held out")),
    ),
    (
        "Accuracy: chosen has the larger implicit reward",
        (("rewards/accuracies", "training"), ("eval/rewards/accuracies", "held out")),
    ),
    ("Implicit rewards", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
)
WIDTH, HEIGHT, LEFT, BOTTOM = 460, 240, 52, 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric over the steps, in the coordinates of its chart."""

    legend: str
    path: str
    """Points of an SVG polyline."""
    last: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves that share axes."""

    title: str
    curves: list[Curve]
    ticks: list[tuple[float, str]]
    """(y in pixels, label) of the horizontal lines."""
    steps: int


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/demo.")],
) -> None:
    """Writes RUN/report.html from the run's metrics and samples: one file, no network needed to read it."""
    print(write_report(run, [], {}))


def write_report(run: Path, exchanges: list[dict[str, Any]], figures: dict[str, float]) -> Path:
    """Writes a run's page.

    Args:
        exchanges: `prompt`, and the answers `before` and `after` (`text`, `tokens`, `right`) to questions over HTTP;
            may be empty.
        figures: what to list at the top; may be empty.

    Returns the page's path.

    Raises:
        ConfigError: the folder holds no metrics.
    """
    from jinja2 import Environment, FileSystemLoader

    metrics = read_metrics(run)
    if not metrics:
        raise ConfigError(f"{run} holds no metrics.jsonl with a reported step, so it is not the folder of a run")
    charts = [chart for title, series in CHARTS if (chart := draw(title, series, metrics))]
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template(PAGE)
    page = run / PAGE
    page.write_text(
        template.render(
            name=run.name,
            charts=charts,
            figures=figures,
            exchanges=exchanges,
            samples=_samples(run),
            width=WIDTH,
            height=HEIGHT,
            left=LEFT,
        ),
        encoding="utf-8",
    )
    return page


def draw(title: str, series: tuple[tuple[str, str], ...], metrics: list[dict[str, float]]) -> Chart | None:
    """Scales some metrics to a chart; None if none of them was measured."""
    measured = {legend: [(line["step"], line[name]) for line in metrics if name in line] for name, legend in series}
    values = [value for points in measured.values() for _, value in points]
    if not values:
        return None
    steps = int(max(line["step"] for line in metrics)) or 1
    low, high = min(values), max(values)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)

    def x(step: float) -> float:
        return LEFT + step / steps * (WIDTH - LEFT - 12)

    def y(value: float) -> float:
        return 12 + (high - value) / (high - low) * (HEIGHT - BOTTOM - 12)

    curves = [
        Curve(
            legend=legend,
            path=" ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points),
            last=f"{points[-1][1]:.3g}",
        )
        for legend, points in measured.items()
        if points
    ]
    # A label next to zero would be long and say nothing.
    ticks = [
        (y(value), f"{value:.3g}" if abs(value) > (high - low) / 100 else "0")
        for value in (low + (high - low) * part / 4 for part in range(5))
    ]
    return Chart(title=title, curves=curves, ticks=ticks, steps=steps)


def _samples(run: Path) -> list[dict[str, Any]]:
    """Sampled answers before and after training, by prompt."""
    file = run / "samples.jsonl"
    by_prompt: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        sample = json.loads(line)
        when = "after" if sample["step"] else "before"
        by_prompt.setdefault(sample["prompt"], {"prompt": sample["prompt"]})[when] = sample
    return [sample for sample in by_prompt.values() if {"before", "after"} <= sample.keys()]
