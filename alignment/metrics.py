"""What a run says: a line per step and a progress bar for people, `metrics.jsonl` and TensorBoard for programs."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

Metrics = dict[str, float]
"""Figures of a step or an evaluation, by name."""

# What the line of a step shows, if it was measured: metric, name, format.
SHOWN = (
    ("reward", "reward", "+.3f"),
    ("kl", "kl", ".3f"),
    ("entropy", "entropy", ".2f"),
    ("completions/mean_length", "tokens", ".0f"),
    ("loss", "loss", ".4f"),
    ("rewards/margins", "margin", "+.3f"),
    ("rewards/accuracies", "accuracy", ".2f"),
    ("grad_norm", "grad", ".2f"),
    ("lr", "lr", ".1e"),
    ("perf/tokens_per_second", "tok/s", ".0f"),
    ("eval/loss", "| held out: loss", ".4f"),
    ("eval/reward", "| held out: reward", "+.3f"),
    ("eval/kl", "kl", ".3f"),
    ("eval/length", "tokens", ".0f"),
    ("eval/rewards/margins", "margin", "+.3f"),
    ("eval/rewards/accuracies", "accuracy", ".2f"),
)


class Reporter(Protocol):
    """Where a loop reports to; the port through which Ray Train's reporting enters."""

    def note(self, text: str) -> None:
        """Says something to people."""

    def begin(self, step: int, steps: int) -> None:
        """The loop starts after `step` of `steps` optimizer steps; what was reported of later steps is void."""

    def report(self, step: int, metrics: Metrics) -> None:
        """Metrics of one step (1 to steps), or of the untrained model (0)."""

    def close(self) -> None:
        """Nothing more will be reported."""


class Silent:
    """The reporter of every worker but the main one."""

    def note(self, text: str) -> None: ...
    def begin(self, step: int, steps: int) -> None: ...
    def report(self, step: int, metrics: Metrics) -> None: ...
    def close(self) -> None: ...


class NoteReporter(Silent):
    """The reporter of a dry run: it talks, and writes nothing."""

    def note(self, text: str) -> None:
        print(text, flush=True)


class FileReporter:
    """Reports to the terminal and into the run's folder."""

    def __init__(self, folder: Path, bar: Any = partial(tqdm, disable=None)) -> None:  # noqa: B008
        """`bar`: makes the progress bar; Ray has one of its own for output that comes from workers. By default there is
        one if the output goes to a terminal.
        """
        # Not SummaryWriter, whose thread and queue can wait for each other for ever if a signal ends the process.
        from tensorboardX.event_file_writer import EventsWriter

        board = folder / "tensorboard"
        board.mkdir(parents=True, exist_ok=True)
        self.file = folder / "metrics.jsonl"
        self.board = EventsWriter(str(board / "events"))
        self._bar_class = bar
        self._bar: Any = None
        self._steps = 0

    def note(self, text: str) -> None:
        tqdm.write(text)
        sys.stdout.flush()  # the lines of a long run should not wait in a pipe's buffer

    def begin(self, step: int, steps: int) -> None:
        self._steps = steps
        kept = [line for line in _lines(self.file) if json.loads(line)["step"] <= step] if step else []
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text("".join(kept))
        unfinished.rename(self.file)
        self._bar = self._bar_class(total=steps, desc="training")
        self._bar.update(step)

    def report(self, step: int, metrics: Metrics) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._draw(step, metrics)
        self.note(_line(step, self._steps, metrics))
        if step:
            self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self.board.close()

    def _draw(self, step: int, metrics: Metrics) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self.board.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self.board.flush()


def read_metrics(run: Path) -> list[dict[str, float]]:
    """All reported steps of a run, in order."""
    return [json.loads(line) for line in _lines(run / "metrics.jsonl")]


def _lines(file: Path) -> list[str]:
    """Complete lines; one that was cut off when the process died is void."""
    if not file.exists():
        return []
    return [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _line(step: int, steps: int, metrics: Metrics) -> str:
    shown = [f"{name} {metrics[key]:{form}}" for key, name, form in SHOWN if key in metrics]
    if metrics.get("skipped"):
        shown.append("SKIPPED: not finite")
    return f"step {step}/{steps}  " + "  ".join(shown)
