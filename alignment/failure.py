"""Why a run ended: told by the worker where it happened to the others, and to whoever started them, through a file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from alignment import errors
from alignment.errors import AlignmentError, CheckpointError

if TYPE_CHECKING:  # who only starts the workers need not wait for torch
    from alignment.models.parallel import World

FAILURE = "failure.json"
"""File in the run's folder: kind and text of the error that ended it. Trying again would not help."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What the system says of a disk that takes nothing more."""


def failure_of(folder: Path) -> AlignmentError | None:
    """The error that ended the run of a folder; None if none did."""
    try:
        kept = json.loads((folder / FAILURE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    error: AlignmentError = getattr(errors, kept["kind"])(kept["text"])
    return error


def clear_failure(folder: Path) -> None:
    """Forgets how an earlier attempt ended."""
    (folder / FAILURE).unlink(missing_ok=True)


@contextlib.contextmanager
def telling_others(folder: Path, world: World) -> Iterator[None]:
    """Ends the run on every worker when one has raised an error of ours: all raise the same, within seconds.

    A worker that raises one writes it down and closes its connections. The others, who wait for it in some collective,
    then fail there and find what it has written.
    """
    try:
        with _full_disk_is_ours(folder):
            yield
    except AlignmentError as error:
        _write(folder, error)
        world.leave()
        raise
    except RuntimeError as error:  # what torch.distributed raises when the other side has gone
        cause = failure_of(folder) if world.size > 1 else None
        if cause is None:
            raise
        world.leave()
        raise cause from error


@contextlib.contextmanager
def _full_disk_is_ours(folder: Path) -> Iterator[None]:
    """Whatever was being written, metrics as well as checkpoints: it would fail again."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        place = error.filename or folder
        raise CheckpointError(
            f"{place} cannot be written: {error.strerror}. Make room and start the run again"
        ) from error


def _write(folder: Path, error: AlignmentError) -> None:
    """Keeps the first error; those that follow from it say less."""
    kind = next(base.__name__ for base in type(error).__mro__ if vars(errors).get(base.__name__) is base)
    unfinished = folder / f".{FAILURE}.{os.getpid()}"
    with contextlib.suppress(OSError):  # a disk may be full, which is told by the error itself
        if not (folder / FAILURE).exists():
            unfinished.write_text(json.dumps({"kind": kind, "text": str(error)}), encoding="utf-8")
            unfinished.rename(folder / FAILURE)
