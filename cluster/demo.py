"""Runs everything by one command: train on preferences, serve, ask the base and the aligned model, compare them.

It does what a user would do, by the same commands: `raylign train`, `raylign serve`, and requests over HTTP.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from alignment.errors import AlignmentError
from alignment.rewards.rules import contains_keyword
from alignment.run_folder import RunFolder
from cluster.api import serve
from cluster.cli import call

RECIPE = Path("configs/align/demo.yaml")
QUESTIONS = Path("configs/data/short_answers.eval.jsonl")
MAX_TOKENS = 160
CONCURRENCY = 16
NUM_PRINTED = 8
"""Number of questions in the table that is printed; the report has all."""


@dataclass(frozen=True, kw_only=True)
class DemoAnswer:
    """The answer of a served model to one question."""

    text: str
    tokens: int
    """Number of tokens."""
    is_right: bool
    """True if it contains one of the question's keywords."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One held-out question with the answers of the base model and of the aligned model."""

    prompt: str
    answer_before: DemoAnswer
    """Of the base model."""
    answer_after: DemoAnswer
    """Of the aligned model."""


def demo(
    output: Annotated[Path, typer.Option(help="Folder of runs; the demo replaces OUTPUT/demo.")] = Path("runs"),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of the training run.")
    ] = None,
) -> None:
    """Aligns the bundled 135M chat model by DPO on real preferences, serves it, and compares it with what it was.

    Takes a few minutes on two CPU cores. The last line printed is one JSON object with the figures; the report with
    curves and samples is OUTPUT/demo/report.html.
    """
    from alignment.report import write_report

    start = time.monotonic()
    run_folder = output / "demo"
    shutil.rmtree(run_folder, ignore_errors=True)
    say(f"1/3  Training on {RECIPE}")
    call_raylign("train", str(RECIPE), f"output={output}", *(overrides or []))
    say("2/3  Serving base and aligned model")
    with serve(run_folder, max_model_len=1024) as endpoint:
        say(f"3/3  Asking both the held-out questions of {QUESTIONS}")
        exchanges = ask_all(endpoint.url, read_questions(QUESTIONS))
    print(table(exchanges[:NUM_PRINTED]))
    figures = {
        **_training_figures(RunFolder(run_folder)),
        **comparison(exchanges),
        "seconds_total": time.monotonic() - start,
    }
    page = write_report(RunFolder(run_folder), [vars(exchange) for exchange in exchanges], figures)
    say(f"Report: {page}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a file of questions; each has `prompt` and `keywords`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ask_all(url: str, questions: list[dict[str, Any]]) -> list[Exchange]:
    """Asks both served models every question over HTTP, with greedy decoding.

    Raises:
        AlignmentError: the endpoint does not serve exactly two models.
    """
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
    names = [model.id for model in client.models.list()]
    if len(names) != 2:
        raise AlignmentError(f"the demo compares two models, but {url} serves {names}")
    aligned_name, base_name = sorted(names, key=lambda name: name != "demo")
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        base_answers = list(pool.map(lambda question: _ask(client, base_name, question), questions))
        aligned_answers = list(pool.map(lambda question: _ask(client, aligned_name, question), questions))
    return [
        Exchange(prompt=question["prompt"], answer_before=base_answer, answer_after=aligned_answer)
        for question, base_answer, aligned_answer in zip(questions, base_answers, aligned_answers, strict=True)
    ]


def comparison(exchanges: list[Exchange]) -> dict[str, float]:
    """Returns the median answer length (tokens) and the share of answers with a keyword, before and after training."""
    figures = {}
    for moment in ("before", "after"):
        answers: list[DemoAnswer] = [getattr(exchange, f"answer_{moment}") for exchange in exchanges]
        figures[f"median_answer_tokens_{moment}"] = float(statistics.median(answer.tokens for answer in answers))
        figures[f"keyword_rate_{moment}"] = sum(answer.is_right for answer in answers) / len(answers)
    return figures


def table(exchanges: list[Exchange], width: int = 56) -> str:
    """Formats both answers to each question side by side, `width` characters each, for the terminal."""
    import textwrap

    lines = [f"\n{'before':<{width}} │ after"]
    for exchange in exchanges:
        lines += ["─" * width + "─┼─" + "─" * width, f"\033[1m{exchange.prompt}\033[0m"]
        left_lines, right_lines = (
            textwrap.wrap(answer.text, width) for answer in (exchange.answer_before, exchange.answer_after)
        )
        height = max(len(left_lines), len(right_lines))
        for left_line, right_line in zip(
            left_lines + [""] * (height - len(left_lines)),
            right_lines + [""] * (height - len(right_lines)),
            strict=True,
        ):
            lines.append(f"{left_line:<{width}} │ {right_line}")
    return "\n".join(lines) + "\n"


def _ask(client: Any, model: str, question: dict[str, Any]) -> DemoAnswer:
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question["prompt"]}],
        max_tokens=MAX_TOKENS,
        temperature=0,
    )
    text = (reply.choices[0].message.content or "").strip()
    return DemoAnswer(
        text=text, tokens=reply.usage.completion_tokens, is_right=contains_keyword(text, question["keywords"])
    )


def _training_figures(run_folder: RunFolder) -> dict[str, float]:
    first_evaluation, *_, last_evaluation = (line for line in run_folder.read_metrics() if "eval/loss" in line)
    summary = run_folder.read_summary()
    return {
        "pairs_per_second": summary["groups_per_second"],
        "accuracy_before": first_evaluation["eval/rewards/accuracies"],
        "accuracy_after": last_evaluation["eval/rewards/accuracies"],
        "margin_after": last_evaluation["eval/rewards/margins"],
        "seconds_training": summary["seconds_training"],
    }


def call_raylign(*arguments: str) -> None:
    """Runs the command `raylign` in a process of its own.

    Raises:
        AlignmentError: it failed; it has printed its own message.
    """
    if call(*arguments):
        raise AlignmentError(f"`raylign {' '.join(arguments)}` failed; its own words are above")


def say(text: str) -> None:
    """Prints a headline."""
    print(f"\n\033[1m{text}\033[0m", flush=True)
