"""Which errors of a worker Ray Train restarts the workers for, and which end the run at once."""

from __future__ import annotations

import pickle

import pytest
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from alignment.errors import AlignmentError, DataError
from cluster.final_error import StopOnFinalError, final_error


def wrapped(error: BaseException) -> Exception:
    """As Ray Train brings an error from a worker, over a process border."""
    brought: Exception = pickle.loads(pickle.dumps(UserExceptionWithTraceback(error, "Traceback …")))
    return brought


def test_an_error_of_ours_ends_the_run_whatever_follows_from_it_on_other_workers() -> None:
    exceptions = {0: wrapped(RuntimeError("Connection closed by peer")), 1: wrapped(DataError("row 7 is bad"))}
    with pytest.raises(ControllerError) as raised:
        StopOnFinalError().after_exception(None, exceptions)
    error = final_error(pickle.loads(pickle.dumps(raised.value)))
    assert isinstance(error, DataError) and str(error) == "row 7 is bad"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), OSError(5, "Input/output error")])
def test_other_errors_are_left_to_max_failures(error: Exception) -> None:
    StopOnFinalError().after_exception(None, {0: wrapped(error)})
    assert final_error(WorkerGroupError("it failed", {0: error})) is None
    assert final_error(ControllerError(error)) is None


def test_every_error_of_ours_crosses_ray() -> None:
    for kind in AlignmentError.__subclasses__():
        with pytest.raises(ControllerError) as raised:
            StopOnFinalError().after_exception(None, {3: wrapped(kind("why"))})
        assert type(final_error(raised.value)) is kind
