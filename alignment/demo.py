"""The whole circle from one command: train on preferences, serve, ask base and aligned model, compare.

It does what a user would do, with the commands that a user would type: `raylign train`, `raylign serve`, HTTP.
"""

from __future__ import annotations

import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from alignment.cli import call
from alignment.errors import AlignmentError
from alignment.rewards.rules import contains_keyword

RECIPE = Path("configs/align/demo.yaml")
QUESTIONS = Path("configs/data/short_answers.eval.jsonl")
MAX_TOKENS = 160
CONCURRENCY = 16
SHOWN = 8
"""Questions in the table that is printed; the report has all."""
START_LIMIT_S = 240.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a served model said to one question."""

    text: str
    tokens: int
    right: bool
    """True if it contains one of the question's keywords."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One held-out question, answered by the base and by the aligned model."""

    prompt: str
    before: Answer
    after: Answer


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

    started = time.monotonic()
    run = output / "demo"
    shutil.rmtree(run, ignore_errors=True)
    say(f"1/3  Training on {RECIPE}")
    call_raylign("train", str(RECIPE), f"output={output}", *(overrides or []))
    say("2/3  Serving base and aligned model")
    with _served(run) as url:
        say(f"3/3  Asking both the held-out questions of {QUESTIONS}")
        exchanges = ask_all(url, read_questions(QUESTIONS))
    print(table(exchanges[:SHOWN]))
    figures = {**_training_figures(run), **comparison(exchanges), "seconds_total": time.monotonic() - started}
    page = write_report(run, [vars(exchange) for exchange in exchanges], figures)
    say(f"Report: {page}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Rows with `prompt` and `keywords`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ask_all(url: str, questions: list[dict[str, Any]]) -> list[Exchange]:
    """Asks both served models every question, greedily, over HTTP.

    Raises:
        AlignmentError: the endpoint does not serve exactly two models.
    """
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
    names = [model.id for model in client.models.list()]
    if len(names) != 2:
        raise AlignmentError(f"the demo compares two models, but {url} serves {names}")
    aligned, base = sorted(names, key=lambda name: name != "demo")
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        before = list(pool.map(lambda question: _ask(client, base, question), questions))
        after = list(pool.map(lambda question: _ask(client, aligned, question), questions))
    return [
        Exchange(prompt=question["prompt"], before=one, after=other)
        for question, one, other in zip(questions, before, after, strict=True)
    ]


def comparison(exchanges: list[Exchange]) -> dict[str, float]:
    """Median answer length (tokens) and share of answers with a keyword, before and after."""
    figures = {}
    for when in ("before", "after"):
        answers: list[Answer] = [getattr(exchange, when) for exchange in exchanges]
        figures[f"median_answer_tokens_{when}"] = float(statistics.median(answer.tokens for answer in answers))
        figures[f"keyword_rate_{when}"] = sum(answer.right for answer in answers) / len(answers)
    return figures


def table(exchanges: list[Exchange], width: int = 56) -> str:
    """Both answers side by side, for the terminal."""
    import textwrap

    lines = [f"\n{'before':<{width}} │ after"]
    for exchange in exchanges:
        lines += ["─" * width + "─┼─" + "─" * width, f"\033[1m{exchange.prompt}\033[0m"]
        left, right = (textwrap.wrap(answer.text, width) for answer in (exchange.before, exchange.after))
        height = max(len(left), len(right))
        for one, other in zip(left + [""] * (height - len(left)), right + [""] * (height - len(right)), strict=True):
            lines.append(f"{one:<{width}} │ {other}")
    return "\n".join(lines) + "\n"


def _ask(client: Any, model: str, question: dict[str, Any]) -> Answer:
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question["prompt"]}],
        max_tokens=MAX_TOKENS,
        temperature=0,
    )
    text = (reply.choices[0].message.content or "").strip()
    return Answer(text=text, tokens=reply.usage.completion_tokens, right=contains_keyword(text, question["keywords"]))


def _training_figures(run: Path) -> dict[str, float]:
    from alignment.metrics import read_metrics
    from alignment.run import SUMMARY

    first, *_, last = (line for line in read_metrics(run) if "eval/loss" in line)
    summary = json.loads((run / SUMMARY).read_text())
    return {
        "pairs_per_second": summary["groups_per_second"],
        "accuracy_before": first["eval/rewards/accuracies"],
        "accuracy_after": last["eval/rewards/accuracies"],
        "margin_after": last["eval/rewards/margins"],
        "seconds_training": summary["seconds_training"],
    }


def call_raylign(*arguments: str) -> None:
    """Runs the command `raylign` as a person would.

    Raises:
        AlignmentError: it failed; its own words have been printed.
    """
    if call(*arguments):
        raise AlignmentError(f"`raylign {' '.join(arguments)}` failed; its own words are above")


@contextmanager
def _served(run: Path) -> Iterator[str]:
    """`raylign serve` on a free port, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    own = [f"folder={run}/serving", f"feedback.database=sqlite:///{run.resolve()}/serving/feedback.sqlite"]
    settings = [f"port={port}", "max_model_len=1024", "no_keys=true", "promote=true", *own]
    server = subprocess.Popen([sys.executable, "-m", "alignment.cli", "serve", str(run), *settings])
    try:
        _wait_until_ready(url, server)
        yield url
    finally:
        server.terminate()
        server.wait()


def _wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    import httpx

    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise AlignmentError("`raylign serve` ended; its own words are above")
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AlignmentError(f"`raylign serve` was not ready after {START_LIMIT_S:g} s")


def say(text: str) -> None:
    """Prints a headline."""
    print(f"\n\033[1m{text}\033[0m", flush=True)
