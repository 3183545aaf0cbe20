"""Files that are complete or absent, even if the process or the machine stops in the middle of a write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_atomically(file: Path) -> Iterator[Path]:
    """Yields a path beside a file for its new content, and puts that in the file's place when the block ends.

    If the block raises an error, the new content is deleted and the file stays as it was.

    Raises:
        OSError: the file cannot be replaced.
    """
    partial_file = file.with_name(f".{file.name}.unfinished")
    try:
        yield partial_file
        partial_file.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            partial_file.unlink()
        raise


def write_durably(file: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replaces a file atomically; returns when it is on the disk. Two writers of one file must share a lock.

    Args:
        mode: permissions of the file, before the process's umask; 0o600 lets its owner alone read it.

    Raises:
        OSError: the file cannot be written; the old content is still there.
    """
    with replace_atomically(file) as partial_file:
        descriptor = os.open(partial_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    flush_to_disk(file.parent)


def flush_to_disk(path: Path) -> None:
    """Flushes a file or folder from the system's memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
