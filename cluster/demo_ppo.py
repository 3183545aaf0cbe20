"""Runs the original RLHF by one command: SFT, a reward model, PPO with its rewards, and a comparison with before."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from alignment.run_folder import RunFolder
from cluster.demo import DemoAnswer, Exchange, call_raylign, say, table

CHAIN = Path("configs/align/rlhf_smollm2.yaml")
NUM_PRINTED = 6
"""Number of questions in the table that is printed."""


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
    from alignment.report import write_report

    start = time.monotonic()
    chain = output / "rlhf_smollm2"
    shutil.rmtree(chain, ignore_errors=True)
    call_raylign("pipeline", str(CHAIN), f"output={output}", *(overrides or []))
    run_folder = RunFolder(chain / "ppo")
    exchanges = exchanges_of(run_folder)
    print(table(exchanges[:NUM_PRINTED]))
    figures = figures_of(run_folder.read_metrics())
    page = write_report(
        run_folder, [vars(exchange) for exchange in exchanges], {**figures, "seconds_total": time.monotonic() - start}
    )
    say(f"Report: {page}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def exchanges_of(run_folder: RunFolder) -> list[Exchange]:
    """Reads the sampled answers of a run to each of its sample prompts, before the first step and after the last."""
    rows = run_folder.read_samples()
    last_step = max(row["step"] for row in rows)
    first_rows, last_rows = ([row for row in rows if row["step"] == step] for step in (0, last_step))
    return [
        Exchange(prompt=first_row["prompt"], answer_before=_demo_answer(first_row), answer_after=_demo_answer(last_row))
        for first_row, last_row in zip(first_rows, last_rows, strict=True)
    ]


def figures_of(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Returns the figures in the demo's last line, from the metrics of every step."""
    evaluations = [line for line in metrics if "eval/reward" in line]
    steps = [line for line in metrics if line["step"]]
    first_evaluation, last_evaluation = evaluations[0], evaluations[-1]
    return {
        "reward_before": first_evaluation["eval/reward"],
        "reward_after": last_evaluation["eval/reward"],
        "reward_std_before": first_evaluation["eval/reward_std"],
        "kl": last_evaluation["eval/kl"],
        "steps": float(len(steps)),
        "seconds_per_step": statistics.median(line["perf/seconds"] for line in steps),
        "rollout_tokens_per_second": statistics.median(line["perf/rollout_tokens_per_second"] for line in steps),
        "mismatch_mean_abs": statistics.fmean(line["mismatch/mean_abs"] for line in steps),
        "eval_reward_before": first_evaluation["eval/eval_rewards/keywords"],
        "eval_reward_after": last_evaluation["eval/eval_rewards/keywords"],
    }


def _demo_answer(row: dict[str, Any]) -> DemoAnswer:
    return DemoAnswer(text=row["answer"].strip(), tokens=row["tokens"], is_right=row["scores"]["keywords"] > 0)
