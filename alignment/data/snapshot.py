"""Writes the rows of live sources, as an endpoint's growing feedback, into the run's folder once, when it begins."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from alignment.data.sources import is_live, read_rows
from alignment.distributed.world import World, run_on_main
from alignment.errors import DataError
from alignment.files import replace_atomically
from alignment.run_folder import RunFolder
from alignment.settings.data import DataConfig, SourceConfig

Source = TypeVar("Source", bound=SourceConfig)


def keep_live_rows(data: DataConfig, run_folder: RunFolder, world: World, note: Callable[[str], None]) -> DataConfig:
    """Returns the configuration with a file of the run in place of every live source. Every worker must call this.

    The main worker writes the files when the run begins. All workers read them, also when the run is resumed, so that
    all train on the same rows, however many have been added to the source since.

    Args:
        note: called with each text that tells people where the rows come from.

    Raises:
        DataError: a source cannot be read, or its rows cannot be written.
    """
    if not any(is_live(source) for source in (*data.sources, *([data.eval] if data.eval else []))):
        return data

    def take_snapshot() -> tuple[DataConfig, list[str]]:
        notes: list[str] = []
        changes = {
            "eval": None if data.eval is None else _snapshot_source(data.eval, run_folder, notes),
            "mixture": tuple(_snapshot_source(source, run_folder, notes) for source in data.mixture),
        }
        return _snapshot_source(data, run_folder, notes).model_copy(update=changes), notes

    snapshot, notes = run_on_main(take_snapshot if world.is_main else None, world)
    for text in notes:
        note(text)
    return snapshot


def _snapshot_source(source: Source, run_folder: RunFolder, notes: list[str]) -> Source:
    """The source with the run's file as its path; writes that file if there is none, and adds a note for people."""
    if not is_live(source):
        return source
    key = hashlib.sha256(repr((source.path, source.skip, source.take)).encode()).hexdigest()[:12]
    file = run_folder.rows_folder / f"rows-{key}.jsonl"
    if file.exists():
        written_at = datetime.datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        notes.append(
            f"data: {source.path} as it was at {written_at}, from {file}: a run goes on with the rows that it began "
            "with; another name reads those that have come since"
        )
    else:
        notes.append(f"data: {_write_rows(source, file)} rows of {source.path} are kept in {file} for this run")
    return source.model_copy(update={"path": str(file), "skip": 0, "take": None})


def _write_rows(source: SourceConfig, file: Path) -> int:
    """Writes the rows and returns their number. An unreadable row is written as a text, so that it stays a bad row."""
    num_rows = 0
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(file) as partial_file, partial_file.open("w", encoding="utf-8") as stream:
            for _, row in read_rows(source):
                stream.write(json.dumps(row if isinstance(row, dict) else str(row)) + "\n")
                num_rows += 1
    except OSError as error:
        raise DataError(f"{file}: the rows of {source.path} cannot be written: {error}") from error
    return num_rows
