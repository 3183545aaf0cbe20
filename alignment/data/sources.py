"""Rows from files and hubs: every row arrives with its origin, and a broken one as an error in its place."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from alignment.config import SourceConfig
from alignment.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")

Row = dict[str, Any]


def read_rows(source: SourceConfig) -> Iterator[tuple[str, Row | DataError]]:
    """Yields (`file:line`, row) for every row between `skip` and `take`, or the error that stands in its place.

    Raises:
        DataError: the source itself cannot be opened.
    """
    assert source.path is not None
    path = Path(source.path).expanduser()
    if path.exists():
        rows: Iterator[tuple[str, Row | DataError]] = (row for file in _files(path) for row in _read_file(file))
    elif source.path.startswith((".", "/", "~")) or source.path.endswith(SUFFIXES):
        raise DataError(f"data file {source.path} does not exist (looked from {Path.cwd()})")
    else:
        rows = _read_hub(source)
    return islice(rows, source.skip, None if source.take is None else source.skip + source.take)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
    if not files:
        raise DataError(f"{path}: holds no file of a known kind ({', '.join(SUFFIXES)})")
    return files


def _read_file(path: Path) -> Iterator[tuple[str, Row | DataError]]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    read = _read_lines if ".jsonl" in path.name else _read_json
    with _open(path) as file:
        yield from read(path, file)


def _open(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _read_lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, Row | DataError]]:
    number = 0
    try:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"{path}:{number}", _parse(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield f"{path}:{number + 1}", DataError(f"the compressed file is damaged from here on ({error})")


def _parse(line: bytes) -> Row | DataError:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"is not valid UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return DataError(f"is not valid JSON: {error.msg.removesuffix(' at')} at character {error.pos}")
    except RecursionError:
        return DataError("is nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return DataError(f"cannot be read: {error}")
    return row if isinstance(row, dict) else DataError(f"must be a JSON object, not {type(row).__name__}")


def _read_json(path: Path, file: BinaryIO) -> Iterator[tuple[str, Row | DataError]]:
    try:
        rows = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: must be a JSON list of objects, not {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", row if isinstance(row, dict) else DataError("must be a JSON object")


def _read_parquet(path: Path) -> Iterator[tuple[str, Row | DataError]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path}:{number}", row
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a readable parquet file: {error}") from error


def _read_hub(source: SourceConfig) -> Iterator[tuple[str, Row | DataError]]:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.path, name=source.name, data_dir=source.data_dir, split=source.split, streaming=source.streaming
        )
    except (
        Exception
    ) as error:  # datasets raises some twenty unrelated kinds, all of which mean that it cannot be loaded
        raise DataError(
            f"{source.path}: is neither a local file nor a dataset that can be loaded from the hub: {error}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source.path}:{number}", row
