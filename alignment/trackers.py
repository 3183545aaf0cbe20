"""Trackers: what the metrics of a run are handed to, besides its own `metrics.jsonl`.

A configuration lists them by name: one of `TRACKERS`, or a `package.module:attribute` of one's own, which is called
with the run's configuration and returns a `Tracker`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from alignment.settings.plugins import load_plugin

if TYPE_CHECKING:
    from alignment.settings.run import RunConfig


class Tracker(Protocol):
    """Gets the metrics of a run, on the main worker alone. An error that it raises ends the run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of one step; 0 is the untrained model. After a resume, a step may come a second time."""

    def close(self) -> None:
        """Ends the tracking, when the run ends."""


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


def build_tracker(name: str, config: RunConfig) -> Tracker:
    """Builds the tracker of a name.

    Raises:
        ConfigError: there is no such tracker.
    """
    tracker: Tracker = load_plugin(name, TRACKERS, "tracker")(config)
    return tracker
