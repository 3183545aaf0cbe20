"""Sources that grow while a run reads them, as an endpoint's feedback does, are written into its folder once."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from alignment.data.sources import is_live, read_rows
from alignment.errors import DataError
from alignment.models.parallel import World, on_every_worker
from alignment.settings.data import DataConfig, SourceConfig

FOLDER = "data"
"""Of a run: holds the rows of its live sources as they were when it began."""

Source = TypeVar("Source", bound=SourceConfig)


def keep_live_rows(data: DataConfig, run: Path, world: World, note: Callable[[str], None]) -> DataConfig:
    """Returns the configuration with a file of the run in place of every live source. Called by every worker.

    The main worker writes the file when the run begins. All workers and every resume read it, so that they learn from
    the same rows, however many have come since.

    Args:
        note: tells people where the rows come from.

    Raises:
        DataError: a source cannot be read, or its rows cannot be written.
    """
    if not any(is_live(source) for source in (*data.sources, *([data.eval] if data.eval else []))):
        return data

    def kept() -> tuple[DataConfig, list[str]]:
        notes: list[str] = []
        changed = {
            "eval": None if data.eval is None else _kept(data.eval, run, notes),
            "mixture": tuple(_kept(source, run, notes) for source in data.mixture),
        }
        return _kept(data, run, notes).model_copy(update=changed), notes

    read, notes = on_every_worker(kept if world.is_main else None, world)
    for text in notes:
        note(text)
    return read


def _kept(source: Source, run: Path, notes: list[str]) -> Source:
    if not is_live(source):
        return source
    key = hashlib.sha256(repr((source.path, source.skip, source.take)).encode()).hexdigest()[:12]
    file = run / FOLDER / f"rows-{key}.jsonl"
    if file.exists():
        written = datetime.datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        notes.append(
            f"data: {source.path} as it was at {written}, from {file}: a run goes on with the rows that it began with; "
            "another name reads those that have come since"
        )
    else:
        notes.append(f"data: {_write(source, file)} rows of {source.path} are kept in {file} for this run")
    return source.model_copy(update={"path": str(file), "skip": 0, "take": None})


def _write(source: SourceConfig, file: Path) -> int:
    """Writes the rows and returns their number. One that could not be read stays bad: text in place of an object."""
    unfinished = file.with_suffix(".unfinished")
    num_rows = 0
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as opened:
            for _, row in read_rows(source):
                opened.write(json.dumps(row if isinstance(row, dict) else str(row)) + "\n")
                num_rows += 1
        unfinished.rename(file)
    except OSError as error:
        raise DataError(f"{file}: the rows of {source.path} cannot be written: {error}") from error
    return num_rows
