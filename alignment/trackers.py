"""Trackers: what the metrics of a run are handed to, besides its own `metrics.jsonl`.

A configuration lists them by name: one of `TRACKERS`, or a `package.module:attribute` of one's own, which is called
with the run's configuration and returns a `Tracker`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, cast

from alignment.errors import ConfigError
from alignment.settings.plugins import load_plugin

if TYPE_CHECKING:
    from alignment.settings.run import RunConfig


class Tracker(Protocol):
    """Gets the metrics of a run, on the main worker alone. An error that `log` raises ends the run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of one step; 0 is the untrained model. After a resume, a step may come a second time."""

    def close(self) -> None:
        """Ends the tracking, when the run ends or fails. An error that it raises is noted."""


class TensorBoard:
    """Writes TensorBoard's file in the run's folder."""

    def __init__(self, config: RunConfig) -> None:
        # SummaryWriter is not used, because its thread and queue can deadlock if a signal ends the process.
        from tensorboardX.event_file_writer import EventsWriter

        folder = config.run_folder.tensorboard_folder
        folder.mkdir(parents=True, exist_ok=True)
        self.writer = EventsWriter(str(folder / "events"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self.writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self.writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self.writer.close()


TRACKERS = {"tensorboard": TensorBoard}
"""The trackers that come with raylign, by name."""


def tracker_class(name: str) -> Callable[[RunConfig], Tracker]:
    """Finds what makes the tracker of a name.

    Raises:
        ConfigError: there is no such tracker.
    """
    return cast("Callable[[RunConfig], Tracker]", load_plugin(name, TRACKERS, "tracker", callable_only=True))


class RunTrackers:
    """The trackers of a run. They begin with the run's first step, so that a run which is refused begins none."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._trackers: dict[str, Tracker] = {}

    def begin(self) -> None:
        """Makes the trackers, unless they are there already.

        Raises:
            ConfigError: one of them fails.
        """
        for name in self._config.trackers:
            if name not in self._trackers:
                with _named_error(name):
                    self._trackers[name] = tracker_class(name)(self._config)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands the metrics of one step to each tracker.

        Raises:
            ConfigError: one of them fails.
        """
        for name, tracker in self._trackers.items():
            with _named_error(name):
                tracker.log(step, metrics)

    def close(self) -> list[str]:
        """Closes the trackers, each once; returns what went wrong, in words."""
        problems = []
        while self._trackers:
            name, tracker = self._trackers.popitem()
            try:
                with _named_error(name):
                    tracker.close()
            except ConfigError as error:
                problems.append(str(error))
        return problems


@contextlib.contextmanager
def _named_error(name: str) -> Iterator[None]:
    """Turns any error of a tracker into a ConfigError, which ends a run on every worker and is not tried again."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"tracker {name!r} has failed: {type(error).__name__}: {error}") from error
