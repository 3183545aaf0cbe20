"""The original RLHF from one command: fine-tune, train a reward model, PPO against it, compare before and after."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from alignment.demo import Answer, Exchange, call_raylign, say, table

CHAIN = Path("configs/align/rlhf_smollm2.yaml")
SHOWN = 6
"""Questions in the table that is printed."""


def demo_ppo(
    output: Annotated[Path, typer.Option(help="Folder of runs; the demo replaces OUTPUT/rlhf_smollm2.")] = Path("runs"),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of the chain, as stages.2.set.steps=8.")
    ] = None,
) -> None:
    """Aligns the bundled 135M chat model by PPO: SFT, a reward model of our own, and PPO with rollouts by vLLM.

    Takes about a quarter of an hour on two CPU cores. The last line printed is one JSON object with the figures; the
    report with curves and samples is OUTPUT/rlhf_smollm2/ppo/report.html.
    """
    from alignment.metrics import read_metrics
    from alignment.report import write_report

    started = time.monotonic()
    chain = output / "rlhf_smollm2"
    shutil.rmtree(chain, ignore_errors=True)
    call_raylign("pipeline", str(CHAIN), f"output={output}", *(overrides or []))
    run = chain / "ppo"
    exchanges = exchanges_of(run)
    print(table(exchanges[:SHOWN]))
    figures = figures_of(read_metrics(run))
    page = write_report(
        run, [vars(exchange) for exchange in exchanges], {**figures, "seconds_total": time.monotonic() - started}
    )
    say(f"Report: {page}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def exchanges_of(run: Path) -> list[Exchange]:
    """What the model of a run said to each of its sample prompts, before the first step and after the last."""
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    last = max(row["step"] for row in rows)
    before, after = ([row for row in rows if row["step"] == step] for step in (0, last))
    return [
        Exchange(prompt=one["prompt"], before=_answer(one), after=_answer(other))
        for one, other in zip(before, after, strict=True)
    ]


def figures_of(metrics: list[dict[str, float]]) -> dict[str, float]:
    """The demo's last line, from the metrics of every step."""
    evaluated = [line for line in metrics if "eval/reward" in line]
    steps = [line for line in metrics if line["step"]]
    first, last = evaluated[0], evaluated[-1]
    return {
        "reward_before": first["eval/reward"],
        "reward_after": last["eval/reward"],
        "reward_std_before": first["eval/reward_std"],
        "kl": last["eval/kl"],
        "steps": float(len(steps)),
        "seconds_per_step": statistics.median(line["perf/seconds"] for line in steps),
        "rollout_tokens_per_second": statistics.median(line["perf/rollout_tokens_per_second"] for line in steps),
        "mismatch_mean_abs": statistics.fmean(line["mismatch/mean_abs"] for line in steps),
        "judge_before": first["eval/judges/keywords"],
        "judge_after": last["eval/judges/keywords"],
    }


def _answer(row: dict[str, Any]) -> Answer:
    return Answer(text=row["answer"].strip(), tokens=row["tokens"], right=row["scores"]["keywords"] > 0)
