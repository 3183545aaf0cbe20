"""What our comparisons with TRL share: both sides take turns, each run in a fresh process that measures itself.

arguments ─► job ─► ours, TRL, ours, TRL … (each alone) ─► medians over the rounds ─► ratios, as one line of JSON
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from alignment.settings.section import NumberFormat

STACK_EXCHANGE = Path("../shared/data/stack_exchange_paired/data/rl/train.jsonl.gz")

Job = TypeVar("Job")
Result = TypeVar("Result")


def parser(name: str, document: str | None, *, columns: str) -> argparse.ArgumentParser:
    """The arguments that every comparison takes.

    Args:
        document: docstring of its module.
        columns: what a row of its data must have.
    """
    description = (document or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m tests.benchmarks.{name}", description=description)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side, taken in turns")
    parser.add_argument("--only", choices=("ours", "trl"), help="run one side only; there are no ratios then")
    parser.add_argument("--data", type=_file, default=str(STACK_EXCHANGE), help=f"rows of {columns} (.jsonl.gz)")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="folder or hub id")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and one answer")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each side")
    formats = ("auto", "bf16", "fp32")
    meaning = "number format of both; auto is bf16 if this CPU computes in it, else fp32"
    parser.add_argument("--dtype", choices=formats, default="auto", help=meaning)
    return parser


def _file(path: str) -> Path:
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{path} does not exist; run from the project's root, or name another file")
    return Path(path)


def set_threads(threads: int) -> None:
    """Gives every process that is started from now on this many threads to compute with."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def shuffled_rows(data: Path) -> list[dict[str, Any]]:
    """All rows of a `.jsonl.gz` file, in a fixed random order."""
    with gzip.open(data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    return rows


def dtype_of(wanted: NumberFormat) -> Literal["bf16", "fp32"]:
    """The number format that `--dtype` means on this machine."""
    from alignment.models.load import number_format

    return number_format(wanted, "cpu")


def alone(work: Callable[..., Result], *arguments: object) -> Result:
    """Does the work in a fresh process and returns what it returns."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def take_turns(
    sides: Mapping[str, Callable[[Job], Result]],
    job: Job,
    *,
    rounds: int,
    only: str | None,
    told: Callable[[Result], str],
) -> dict[str, list[Result]]:
    """Runs every side, or only one, as often as there are rounds; a machine that slows down slows both.

    Args:
        told: what is printed of a run when it has ended.
    """
    runs: dict[str, list[Result]] = {name: [] for name in sides if only in (None, name)}
    for number in range(1, rounds + 1):
        for name, of in runs.items():
            of.append(alone(sides[name], job))
            print(f"round {number}/{rounds}  {name:4}  {told(of[-1])}", flush=True)
    return runs


def stopwatch(seconds: list[float]) -> Any:
    """A callback for a Trainer of transformers that appends how long each optimizer step took."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    return Stopwatch()


def peak_memory_gb() -> dict[int, float]:
    """Most memory that this process and each of those below it ever held, in 10⁹ bytes, by process id.

    Their sum counts what they share more than once, and peaks that were not at the same time: it is never too small.
    Not `getrusage`: its figure begins with the memory of the process that started this one.
    """
    import psutil

    family = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    return {pid: peak / 1e9 for pid in family if (peak := _peak_bytes(pid))}


def _peak_bytes(pid: int) -> int:
    """0 for a process that has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def medians(runs: Mapping[str, list[Result]], figure: Callable[[Result], float]) -> dict[str, float]:
    """The median over the rounds of each side's figure."""
    return {name: statistics.median(map(figure, of)) for name, of in runs.items()}


def ratio(figures: Mapping[str, float]) -> float | None:
    """Ours / TRL's; None if only one side has run."""
    return round(figures["ours"] / figures["trl"], 3) if len(figures) == 2 else None


def rounded(figures: Mapping[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in figures.items()}


def versions(*packages: str) -> dict[str, str]:
    """Of packages that are installed."""
    return {name: version(name) for name in packages}
