"""Ends a run at once if a worker raises an error of ours, for which Ray Train would restart the workers in vain."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback
from ray.train.v2.api.exceptions import ControllerError

from alignment.errors import AlignmentError


class StopOnFinalError(UserCallback):  # type: ignore[misc]
    """Ends the run on all workers as soon as one has raised an AlignmentError. It runs in Ray Train's controller.

    Other failures (a killed process, no memory, a bug) are left to `max_failures`.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises the first AlignmentError of a worker as the error of the run."""
        for _, exception in sorted(worker_exceptions.items()):
            error = getattr(exception, "_base_exc", exception)  # Ray Train wraps the error with its traceback
            if isinstance(error, AlignmentError):
                raise ControllerError(error)


def final_error(error: Exception) -> AlignmentError | None:
    """The AlignmentError that ended a run; None if another error did."""
    failure = getattr(error, "controller_failure", None)
    return failure if isinstance(failure, AlignmentError) else None
