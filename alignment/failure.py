"""The error that ended a run: the worker that raised it writes it to a file, for the other workers and the driver."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from alignment import errors
from alignment.errors import AlignmentError, CheckpointError
from alignment.run_folder import RunFolder

if TYPE_CHECKING:  # the driver, which starts the workers, needs no torch
    from alignment.distributed.world import World

FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Error numbers of the operating system for a disk that cannot be written."""


def failure_of(run_folder: RunFolder) -> AlignmentError | None:
    """Returns the error that ended a run; None if there is none."""
    try:
        record = json.loads(run_folder.failure_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    error: AlignmentError = getattr(errors, record["kind"])(record["text"])
    return error


def clear_failure(run_folder: RunFolder) -> None:
    """Deletes the error of an earlier attempt."""
    run_folder.failure_file.unlink(missing_ok=True)


@contextlib.contextmanager
def propagate_failure(run_folder: RunFolder, world: World) -> Iterator[None]:
    """Ends the run on every worker if one of them raises an AlignmentError: all raise the same one, within seconds.

    The worker with the error writes it to the file and closes its connections. The others, which wait for it in a
    collective, then fail there and read the file.

    Raises:
        AlignmentError: the error of this worker, or that of the worker which failed first.
    """
    try:
        with _convert_full_disk(run_folder):
            yield
    except AlignmentError as error:
        _write_failure(run_folder, error)
        world.leave()
        raise
    except RuntimeError as error:  # torch.distributed raises it when another worker has closed its connection
        cause = failure_of(run_folder) if world.size > 1 else None
        if cause is None:
            raise
        world.leave()
        raise cause from error


@contextlib.contextmanager
def _convert_full_disk(run_folder: RunFolder) -> Iterator[None]:
    """Turns an OSError of a full disk into a CheckpointError, whichever file was written: it would occur again."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK_ERRNOS:
            raise
        path = error.filename or run_folder
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}. Make room and start the run again"
        ) from error


def _write_failure(run_folder: RunFolder, error: AlignmentError) -> None:
    """Writes the error, unless there is one already; the errors that follow from the first one say less."""
    kind = next(base.__name__ for base in type(error).__mro__ if vars(errors).get(base.__name__) is base)
    file = run_folder.failure_file
    partial_file = file.with_name(f".{file.name}.{os.getpid()}")  # several workers may write at the same time
    with contextlib.suppress(OSError):  # the disk may be full, and the error itself says so
        if not file.exists():
            partial_file.write_text(json.dumps({"kind": kind, "text": str(error)}), encoding="utf-8")
            partial_file.rename(file)
