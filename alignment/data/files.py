"""Reads the rows of a file of any known kind: JSON lines, JSON, tables, parquet; and of a set that `datasets` saved."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO, cast

from alignment.data.unique_keys import unique_keys
from alignment.errors import DataError


class Cell(str):
    """The text of one cell of a table. A table has texts for numbers, for true and false, and for lists as JSON."""


Row = dict[str, Any]
Rows = Iterator[tuple[str, Row | DataError]]

TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")


def _open_zstandard(path: Path) -> io.BufferedReader:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


DECOMPRESS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}
SUFFIXES = (*TEXTS, *(text + packed for text in TEXTS for packed in DECOMPRESS), ".parquet")
KINDS = f"{', '.join(TEXTS)} (each also {', '.join(DECOMPRESS)}) and .parquet"
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, OSError)
"""Exceptions that a damaged compressed file raises while it is read."""
SEPARATORS = {".csv": ",", ".tsv": "\t"}
CONTAINERS = ("data", "rows", "examples", "instances", "records", "items")
"""Keys under which a JSON object keeps its rows."""
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in the names of files and folders, each with the split that it means, as in `datasets`."""
DEFAULT_SPLIT = "train"
csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # by default a cell has 131,072 characters at most


def read_file(path: Path, split: str = DEFAULT_SPLIT) -> Rows:
    """Yields (`file:line`, row) for every row of a file or of a saved set; a broken row is yielded as its DataError.

    Args:
        split: the split to read from a JSON object that holds several.

    Raises:
        DataError: the file cannot be read at all.
    """
    if path.is_dir():
        yield from _read_saved_set(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        with _open(path) as file:
            if (separator := SEPARATORS.get(file_kind(path))) is not None:
                yield from _read_table(path, file, separator)
            else:
                yield from _read_json(path, file, split)


def is_data_file(path: Path | str) -> bool:
    """True if the name has the suffix of a kind of file that can be read."""
    return str(path).endswith(SUFFIXES)


def file_kind(path: Path) -> str:
    """Suffix of a file, before the suffix of its compression; empty for a saved set."""
    kind = path.with_suffix("").suffix if path.suffix in DECOMPRESS else path.suffix
    return kind if kind in (*TEXTS, ".parquet") else ""


def _open(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, DECOMPRESS[path.suffix](path)) if path.suffix in DECOMPRESS else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def parse_line(line: bytes) -> Row | DataError:
    """Parses one line of JSON; returns the object, or a DataError that says why the line is no JSON object."""
    row = _parse_json(line)
    return row if isinstance(row, dict | DataError) else DataError(f"must be a JSON object, not {type(row).__name__}")


def _parse_json(line: bytes, make_object: Callable[[list[tuple[str, Any]]], Any] = unique_keys) -> Any:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=make_object)
    except DataError as error:
        return error
    except UnicodeDecodeError as error:
        return DataError(f"is not valid UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return DataError(f"is not valid JSON: {error.msg.removesuffix(' at')} at character {error.pos}")
    except RecursionError:
        return DataError("is nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return DataError(f"cannot be read: {error}")


def _read_json(path: Path, file: BinaryIO, split: str) -> Rows:
    """Reads JSON lines, or one JSON value that holds all rows; the first line shows which, and not the name."""
    first_lines, lines = _peek_lines(file)
    first_line = next((line for line in first_lines if line.strip()), b"")
    is_alone = len(first_lines) < 2 or not first_lines[-1].strip() or first_lines[-1] is first_line
    first_byte = first_line.lstrip()[:1]
    value = _parse_json(first_line, dict) if first_byte in (b"[", b"{") else None
    is_list = first_byte == b"[" and (isinstance(value, DataError) or is_alone)
    # In a .jsonl a broken first line is a broken row; in a .json it is the beginning of a value of many lines.
    if is_list or (file_kind(path) == ".json" and (not isinstance(value, dict) or is_alone)):
        yield from _read_value(path, lines, split)
    else:
        yield from _read_lines(path, lines)


def _peek_lines(file: BinaryIO) -> tuple[list[bytes], Iterator[bytes]]:
    """The lines up to the second that is not blank, and an iterator of all lines, which raises what reading raised."""
    first_lines: list[bytes] = []
    damage = None
    try:
        for line in file:
            first_lines.append(line if first_lines else line.removeprefix(b"\xef\xbb\xbf"))
            if sum(bool(line.strip()) for line in first_lines) == 2:
                break
    except DAMAGE as error:
        damage = error
    return first_lines, chain(first_lines, _raise_on_iteration(damage) if damage else file)


def _raise_on_iteration(error: Exception) -> Iterator[bytes]:
    raise error
    yield b""


def _read_lines(path: Path, lines: Iterable[bytes]) -> Rows:
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", parse_line(line)
    except DAMAGE as error:
        yield f"{path}:{number + 1}", _damage_error(error)


def _damage_error(error: Exception) -> DataError:
    return DataError(f"the compressed file is damaged from here on ({error})")


def _read_value(path: Path, lines: Iterable[bytes], split: str) -> Rows:
    try:
        value = json.loads(b"".join(lines).decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (ValueError, RecursionError, *DAMAGE) as error:
        raise DataError(f"{path}: is not valid JSON: {error}") from error
    for number, row in enumerate(_extract_rows(value, path, split), start=1):
        yield f"{path}:{number}", row if isinstance(row, dict) else DataError("must be a JSON object")


def _extract_rows(value: Any, path: Path, split: str) -> list[Any]:
    """The rows of a JSON value, which is a list, an object that holds the list, an object of columns, or one row."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError(f"{path}: must be a JSON list of objects, not {type(value).__name__}")
    lists = {name: rows for name, rows in value.items() if _is_list_of_rows(rows)}
    splits = [name for name in lists if name.lower() in SPLIT_WORDS]
    if splits and len(splits) == len(lists):
        if split not in splits:
            raise DataError(f"{path}: has no split {split!r}; there are {', '.join(splits)}. Choose one by split")
        return cast(list[Any], lists[split])
    if len(lists) == 1 and (name := next(iter(lists))) in CONTAINERS:
        return cast(list[Any], lists[name])
    columns = list(value.values())
    if columns and all(isinstance(column, dict) for column in columns):  # as pandas' to_json writes them
        keys = list(columns[0])
        if keys and all(key.isdecimal() for key in keys) and all(list(column) == keys for column in columns):
            return [{name: column[key] for name, column in value.items()} for key in keys]
    if columns and all(isinstance(column, list) and not _holds_mappings(column) for column in columns):
        lengths = {name: len(column) for name, column in value.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{path}: its columns have different lengths: {lengths}")
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return [value]


def _is_list_of_rows(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def _holds_mappings(column: list[Any]) -> bool:
    return any(isinstance(cell, dict) for cell in column)


def _read_table(path: Path, file: BinaryIO, separator: str) -> Rows:
    """Reads a table with a header. Every cell is a text, and an empty cell is None. A cell may hold line breaks."""
    marks = chain(["\ufeff"], repeat(""))  # some programs write it at the beginning of a file
    texts = (line.decode("utf-8", "surrogateescape").removeprefix(mark) for line, mark in zip(file, marks))  # noqa: B905
    reader = csv.reader(texts, delimiter=separator, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            yield f"{path}:{line}", DataError(f"is not a row of cells: {error}")
            continue
        except DAMAGE as error:
            yield f"{path}:{line}", _damage_error(error)
            return
        if not any(cells):
            continue
        if header:
            yield f"{path}:{line}", _make_row(header, cells)
        else:
            header = _header(path, cells, separator)


def _header(path: Path, cells: list[str], separator: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not "".join(names).isprintable():
        raise DataError(f"{path}: does not begin with the names of columns in UTF-8; save it as UTF-8")
    other_separator = next((sign for sign in (";", "\t", "|", ",") if sign in cells[0] and len(cells) == 1), None)
    if other_separator is not None:
        raise DataError(
            f"{path}: its first line, {cells[0]!r:.80}, seems to separate columns by {other_separator!r}, and a "
            f"{file_kind(path)} file is read with {separator!r} between them; write it so, or as .jsonl"
        )
    duplicate = next((name for name, count in Counter(names).items() if count > 1), None)
    if duplicate is not None or "" in names[1:]:
        raise DataError(f"{path}: the first line must name every column once, and {duplicate or ''!r} does not")
    return names


def _make_row(header: list[str], cells: list[str]) -> Row | DataError:
    if len(cells) != len(header):
        return DataError(f"has {len(cells)} cells, and the first line names {len(header)} columns")
    for name, cell in zip(header, cells, strict=True):
        if any("\udc80" <= character <= "\udcff" for character in cell):
            return DataError(f"is not valid UTF-8 in column {name!r}")
    return {name: Cell(cell) if cell else None for name, cell in zip(header, cells, strict=True) if name}


def _read_parquet(path: Path) -> Rows:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path}:{number}", row
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a readable parquet file: {error}") from error


def _read_saved_set(folder: Path) -> Rows:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # as with the hub: some twenty unrelated kinds
        raise DataError(f"{folder}: is not a readable folder of save_to_disk: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{folder}:{number}", row
