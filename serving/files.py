"""Small files that are complete or absent, even if the process or the machine stops in the middle of a write."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(file: Path, content: bytes) -> None:
    """Replaces a file atomically, readable by its owner alone; returns when it is on the disk.

    Raises:
        OSError: the file cannot be written; the old content is still there.
    """
    temporary_file = file.with_name(f".{file.name}.unfinished")
    descriptor = os.open(temporary_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary_file.replace(file)
