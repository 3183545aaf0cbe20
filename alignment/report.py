"""Writes a run as one self-contained HTML page: its curves, its figures and sampled answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from alignment.errors import ConfigError
from alignment.run_folder import RunFolder

PAGE = "report.html"
# Title, then the metrics that share its axes: (metric, legend).
CHARTS = (
    ("Reward", (("reward", "training"), ("eval/reward", "held out"))),
    ("Divergence from the reference, nats per answer", (("kl", "training"), ("eval/kl", "held out"))),
    ("Entropy, nats per token", (("entropy", "training"),)),
    ("Tokens per answer", (("completions/mean_length", "training"), ("eval/length", "held out"))),
    (
        "Evaluation reward: keywords",
        (("eval/eval_rewards/keywords", "held out"), ("eval/judges/keywords", "held out, of an earlier release")),
    ),
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
    """Its name in the legend."""
    path: str
    """Points of an SVG polyline."""
    last_value: str
    """The value at the last step, formatted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves that share axes."""

    title: str
    """Its headline."""
    curves: list[Curve]
    ticks: list[tuple[float, str]]
    """(y in pixels, label) of the horizontal lines."""
    steps: int
    """The last step on the horizontal axis."""


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/demo.")],
) -> None:
    """Writes RUN/report.html from the run's metrics and samples: one file, no network needed to read it."""
    print(write_report(RunFolder(run), [], {}))


def write_report(run_folder: RunFolder, exchanges: list[dict[str, Any]], figures: dict[str, float]) -> Path:
    """Writes a run's page.

    Args:
        exchanges: questions that were asked over HTTP: each has `prompt`, `answer_before` and `answer_after` (with
            `text`, `tokens` and `is_right`); may be empty.
        figures: numbers to list at the top, by name; may be empty.

    Returns:
        The path of the page.

    Raises:
        ConfigError: the folder holds no metrics.
    """
    from jinja2 import Environment, FileSystemLoader

    metrics = run_folder.read_metrics()
    if not metrics:
        raise ConfigError(
            f"{run_folder} holds no {run_folder.metrics_file.name} with a reported step, so it is not the folder of a "
            "run"
        )
    charts = [chart for title, series in CHARTS if (chart := draw(title, series, metrics))]
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template(PAGE)
    page = run_folder.report_file
    page.write_text(
        template.render(
            name=run_folder.path.name,
            charts=charts,
            figures=figures,
            exchanges=exchanges,
            samples=_samples(run_folder),
            width=WIDTH,
            height=HEIGHT,
            left=LEFT,
        ),
        encoding="utf-8",
    )
    return page


def draw(title: str, series: tuple[tuple[str, str], ...], metrics: list[dict[str, float]]) -> Chart | None:
    """Makes a chart of some metrics, scaled to its size; None if the run has none of them.

    Args:
        series: (metric, legend) of each curve.
        metrics: the metrics of every step.
    """
    points_by_legend = {
        legend: [(line["step"], line[name]) for line in metrics if name in line] for name, legend in series
    }
    values = [value for points in points_by_legend.values() for _, value in points]
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
            last_value=f"{points[-1][1]:.3g}",
        )
        for legend, points in points_by_legend.items()
        if points
    ]
    # A value very near to zero would have a long label; it is written as 0.
    ticks = [
        (y(value), f"{value:.3g}" if abs(value) > (high - low) / 100 else "0")
        for value in (low + (high - low) * quarter / 4 for quarter in range(5))
    ]
    return Chart(title=title, curves=curves, ticks=ticks, steps=steps)


def _samples(run_folder: RunFolder) -> list[dict[str, Any]]:
    """The prompts that have sampled answers from before and after training, with both answers."""
    by_prompt: dict[str, dict[str, Any]] = {}
    for sample in run_folder.read_samples():
        field = "answer_after" if sample["step"] else "answer_before"
        by_prompt.setdefault(sample["prompt"], {"prompt": sample["prompt"]})[field] = sample
    return [sample for sample in by_prompt.values() if {"answer_before", "answer_after"} <= sample.keys()]
