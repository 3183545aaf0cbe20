"""Reporting: a line per step and a progress bar for people, `metrics.jsonl` and trackers for programs."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from alignment.run_folder import append_row, truncate_rows
from alignment.trackers import RunTrackers

if TYPE_CHECKING:
    from alignment.settings.run import RunConfig

Metrics = dict[str, float]
"""Figures of a step or an evaluation, by name."""

# The metrics that the line of a step shows, if they were measured: metric, label, format.
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
    """The port to which a training loop reports. Ray Train's reporting implements it too."""

    def note(self, text: str) -> None:
        """Prints a text for people."""

    def begin(self, step: int, steps: int) -> None:
        """Announces that the loop starts after `step` of `steps` optimizer steps. Reports of later steps are void."""

    def report(self, step: int, metrics: Metrics) -> None:
        """Reports the metrics of one step (1 to steps), or of the untrained model (0)."""

    def close(self) -> None:
        """Ends the reporting. It may be called more than once."""


class Silent:
    """A reporter that does nothing, for all workers but the main one."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def begin(self, step: int, steps: int) -> None:
        """Does nothing."""

    def report(self, step: int, metrics: Metrics) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class NoteReporter(Silent):
    """The reporter of a dry run: it prints notes, and writes no file."""

    def note(self, text: str) -> None:
        """Prints a text."""
        print(text, flush=True)


class FileReporter:
    """Reports to the terminal, to the run's `metrics.jsonl` and to its trackers."""

    def __init__(self, config: RunConfig, bar: Any = partial(tqdm, disable=None)) -> None:  # noqa: B008
        """Makes the reporter of a run.

        Args:
            config: the run's configuration.
            bar: makes the progress bar. Ray has its own for the output of workers. By default, there is a bar if the
                output goes to a terminal.
        """
        self._trackers = RunTrackers(config)
        config.folder.mkdir(parents=True, exist_ok=True)
        self.file = config.run_folder.metrics_file
        self._bar_class = bar
        self._bar: Any = None
        self._steps = 0

    def note(self, text: str) -> None:
        """Prints a text above the progress bar."""
        tqdm.write(text)
        sys.stdout.flush()  # a pipe's buffer should not hold back the lines of a long run

    def begin(self, step: int, steps: int) -> None:
        """Drops the metrics of later steps, begins the trackers, and shows the progress bar."""
        self._steps = steps
        self._trackers.begin()
        truncate_rows(self.file, step)
        self._bar = self._bar_class(total=steps, desc="training")
        self._bar.update(step)

    def report(self, step: int, metrics: Metrics) -> None:
        """Writes the metrics of a step to the file, hands them to the trackers, and prints its line."""
        append_row(self.file, {"step": step, **metrics})
        self._trackers.log(step, metrics)
        self.note(_line(step, self._steps, metrics))
        if step:
            self._bar.update(1)

    def close(self) -> None:
        """Closes the progress bar and the trackers; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
        for problem in self._trackers.close():
            self.note(f"WARNING, {problem}")


def _line(step: int, steps: int, metrics: Metrics) -> str:
    """The line of a step for people."""
    figures = [f"{name} {metrics[key]:{number_format}}" for key, name, number_format in SHOWN if key in metrics]
    if metrics.get("skipped"):
        figures.append("SKIPPED: not finite")
    return f"step {step}/{steps}  " + "  ".join(figures)
