"""Tells Ray Train that an error of ours is final: it would restart the workers for it, and it would happen again."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback
from ray.train.v2.api.exceptions import ControllerError

from alignment.errors import AlignmentError


class EndForGood(UserCallback):  # type: ignore[misc]
    """Ends the run on every worker as soon as one has raised an AlignmentError. Runs where Ray Train decides.

    What is no error of ours (a killed process, no memory, a bug) is left to `max_failures`.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for _, exception in sorted(worker_exceptions.items()):
            error = getattr(exception, "_base_exc", exception)  # Ray Train wraps it with its traceback
            if isinstance(error, AlignmentError):
                raise ControllerError(error)


def final_error(error: Exception) -> AlignmentError | None:
    """The error of ours for which Ray Train has ended a run; None if it was another."""
    failure = getattr(error, "controller_failure", None)
    return failure if isinstance(failure, AlignmentError) else None
