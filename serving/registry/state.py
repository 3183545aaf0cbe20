"""Which versions answer requests, and how promotions, canaries and rollbacks change that: REGISTRY/state.json.

Every method that changes something returns a new state. `serving.registry.versions` stores it under a lock.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from alignment.errors import CheckpointError, ServingError

MAX_PREVIOUS_VERSIONS = 100
"""How many earlier versions rollbacks can return to."""
HEARTBEAT_TIMEOUT_S = 30.0
"""Seconds without a heartbeat after which a change in progress counts as abandoned."""

Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True)
class PendingChange:
    """A promotion, canary or rollback that has begun and has not been committed."""

    number: int
    """Number of the version that will answer."""
    share: float | None = None
    """Fraction of the requests that it will answer as a canary; None if it will become the current version."""
    is_rollback: bool = False
    """Whether the change returns to the previous version."""
    token: str = ""
    """Identifies the process that carries out the change."""
    started_by: str = ""
    """Name of the key that requested the change."""
    began: float = 0.0
    """Time of the request (seconds since 1970, UTC)."""
    heartbeat: float = 0.0
    """Last sign of life of the process that carries out the change (seconds since 1970, UTC)."""

    def __str__(self) -> str:
        kind = "the rollback to" if self.is_rollback else "the promotion of" if self.share is None else "the trial of"
        requester = f", which {self.started_by} asked for" if self.started_by else ""
        return f"{kind} version {self.number}{requester}, is under way since {format_time(self.began)}"


class ChangeUnderWay(ServingError):
    """Versions cannot be changed, because another change is still in progress."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Which versions answer requests."""

    current: int = 0
    """Number of the version that answers; 0 before the first promotion."""
    previous: int | None = None
    """Number of the version that a rollback returns to; None if there is none."""
    older: tuple[int, ...] = ()
    """Numbers of the versions that further rollbacks return to, the newest first."""
    canary: int | None = None
    """Number of the version that answers a share of the requests on trial."""
    share: float = 0.0
    """Fraction of the requests that the canary answers, 0 to below 1; at 0 it answers only requests that name it."""
    serial: int = 0
    """How many times the versions that answer have been changed."""
    pending: PendingChange | None = None
    """The change in progress. It no longer counts once its process has stopped renewing it."""

    def change(self, time_s: float | None = None) -> PendingChange | None:
        """The change in progress, if its process still renews it.

        Args:
            time_s: seconds since 1970 (UTC); None is the current time.
        """
        if self.pending is None:
            return None
        silent_s = (time.time() if time_s is None else time_s) - self.pending.heartbeat
        return self.pending if silent_s < HEARTBEAT_TIMEOUT_S else None

    def check_no_change(self) -> None:
        """Checks that no change is in progress.

        Raises:
            ChangeUnderWay: there is one.
        """
        change = self.change()
        if change is not None:
            raise ChangeUnderWay(f"{change}; versions are changed one after the other, so try again when it has ended")

    def own_change(self, token: str) -> PendingChange:
        """The change that the process with this token began.

        Raises:
            ServingError: the change has ended, because it was not renewed in time and another process began its own.
        """
        if self.pending is None or self.pending.token != token:
            raise ServingError(
                f"the change has been given up, since its process was silent for {HEARTBEAT_TIMEOUT_S:g} s and longer; "
                "try again"
            )
        return self.pending

    def promote(self, number: int) -> State:
        """The state in which a version is the current one, without a canary."""
        state = self.end_canary()
        if number == self.current:
            return state
        older = self.older if self.previous is None else (self.previous, *self.older)
        previous = self.current or None
        return replace(state, current=number, previous=previous, older=older[:MAX_PREVIOUS_VERSIONS])

    def start_canary(self, number: int, share: float) -> State:
        """The state in which a version is the canary with a share of the requests.

        Raises:
            ServingError: the version is the current one, there is another canary, or the share is not from 0 to
                below 1.
        """
        if not 0 <= share < 1:
            raise ServingError(f"the share of a canary is from 0 to below 1, not {share:g}; to give it all, promote it")
        if number == self.current:
            raise ServingError(f"version {number} answers already, so it cannot be tried beside itself")
        if self.canary not in (None, number):
            raise ServingError(f"version {self.canary} is being tried already; promote it first, or roll it back")
        return replace(self, canary=number, share=share)

    def end_canary(self) -> State:
        """The state without a canary."""
        return replace(self, canary=None, share=0.0)

    def rollback_target(self) -> int:
        """The number of the version that a rollback returns to.

        Raises:
            ServingError: there is none.
        """
        if self.previous is None:
            raise ServingError(f"nothing answered before version {self.current}, so there is nothing to go back to")
        return self.previous


def format_time(time_s: float) -> str:
    """A time (seconds since 1970, UTC) for people to read."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time_s)) + " UTC"


def read_file(file: Path, kind: TypeAdapter[Content]) -> Content | None:
    """Reads and checks a JSON file; None if there is no such file."""
    try:
        return kind.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: it does not hold what was written there") from error
