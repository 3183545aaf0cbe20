"""Finds the files of a folder that hold the rows of a split, and reads the rows of a file of any known kind.

path ─► data_files (split, hidden files, saved sets) ─► read_file ─┬─ JSON lines, JSON, CSV, TSV, compressed or not
                                                                    └─ parquet, folders of `datasets`' save_to_disk
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO, cast

import yaml

from alignment.errors import DataError

logger = logging.getLogger(__name__)


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
SAVED_SET = ("dataset_info.json", "state.json")
"""Files beside the .arrow files in a folder written by `save_to_disk` of `datasets`."""
NO_DATA = (*SAVED_SET, "dataset_infos.json", "dataset_dict.json", "config.json")
"""Files that describe a data set and hold no rows."""
CONTAINERS = ("data", "rows", "examples", "instances", "records", "items")
"""Keys under which a JSON object keeps its rows."""
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in the names of files and folders, each with the split that it means, as in `datasets`."""
SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
NO_SPLIT = ("part", "data", "shard", "chunk", "file", "output", "batch")
"""First words in the names of shards that name no split."""
DEFAULT_SPLIT, DEFAULT_CONFIG = "train", "default"
csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # by default a cell has 131,072 characters at most


def data_files(folder: Path, split: str, config: str | None = None) -> list[Path]:
    """Returns the files, and folders of saved sets, that hold the rows of a split, in the order of their names.

    The README of a data set from the hub says which files belong to a split. Without one, the names do: `train.jsonl`,
    `train-00000-of-00001.parquet`, `my_test.csv`, `train/a.jsonl`. If no name says a split, all files are the split
    `train`.

    Args:
        split: the name of a split, or of several, as `train+test`.
        config: the configuration (`data.name`) of a data set with several: one that the README names, or a folder.

    Raises:
        DataError: the folder has no file of that split, no such configuration, or the same rows twice; the text names
            the splits or configurations that there are.
    """
    splits_by_file = _declared_splits(folder, config)
    if not splits_by_file and config is not None:
        if not (folder / config).is_dir() and config != DEFAULT_CONFIG:
            raise DataError(f"{folder}: has no configuration {config!r}: neither its README nor a folder is called so")
        folder = folder / config if (folder / config).is_dir() else folder
    files = _list_data_files(folder)
    if not files:
        raise DataError(f"{folder}: holds no file of a known kind ({KINDS})")
    if splits_by_file:
        splits = {file: splits_by_file.get(file, []) for file in files}
    else:
        splits = {file: _split_names(file.relative_to(folder)) for file in files}
    if not any(splits.values()):
        if split != DEFAULT_SPLIT:
            raise DataError(f"{folder}: has no split {split!r}: its files' names say no split")
        return _drop_duplicate_forms(folder, files)
    selected_files: set[Path] = set()
    for name in split.split("+"):
        split_files = [file for file in files if name in splits[file]]
        if not split_files:
            choices = ", ".join(sorted({names[0] for names in splits.values() if names}))
            raise DataError(f"{folder}: has no split {name!r}; there are {choices}. Choose one by split")
        selected_files.update(split_files)
    skipped_names = [file.name for file in files if not splits[file]]
    if skipped_names:
        logger.warning("%s: the names of %s say no split, so they are not read", folder, ", ".join(skipped_names[:3]))
    return _drop_duplicate_forms(folder, [file for file in files if file in selected_files])


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
            if (separator := SEPARATORS.get(_kind(path))) is not None:
                yield from _read_table(path, file, separator)
            else:
                yield from _read_json(path, file, split)


def is_data_file(path: Path | str) -> bool:
    """True if the name has the suffix of a kind of file that can be read."""
    return str(path).endswith(SUFFIXES)


def may_hold_split(path: Path, split: str) -> bool:
    """True if a single file can be read as this split. Every file is `train`, and a .json may hold several splits."""
    names = [DEFAULT_SPLIT, *_split_names(Path(path.name))]
    return _kind(path) == ".json" or all(name in names for name in split.split("+"))


def _list_data_files(folder: Path) -> list[Path]:
    files = []
    for path in sorted(folder.rglob("*")):
        components = path.relative_to(folder).parts
        if any(component.startswith((".", "__", "_delta_log")) for component in components) or path.name in NO_DATA:
            continue
        if _is_saved_set(path) or (path.is_file() and is_data_file(path)):
            files.append(path)
    return [folder] if _is_saved_set(folder) else files


def _declared_splits(folder: Path, config: str | None) -> dict[Path, list[str]]:
    """The splits of each file by the `configs` in the head of a README, as the hub reads it; empty if it has none.

    Raises:
        DataError: the README has several configurations, and `config` is none of them.
    """
    readme = folder / "README.md"
    sections = readme.read_text(encoding="utf-8", errors="replace").split("---", 2) if readme.is_file() else []
    try:
        head = yaml.safe_load(sections[1]) if len(sections) == 3 and not sections[0].strip() else None
    except yaml.YAMLError:
        return {}
    configs = head.get("configs") if isinstance(head, dict) else None
    entries = [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []
    named_entries = {
        str(entry.get("config_name", DEFAULT_CONFIG)): entry for entry in entries if entry.get("data_files")
    }
    if not named_entries:
        return {}
    defaults = (name for name, entry in named_entries.items() if entry.get("default") or len(named_entries) == 1)
    default = next(defaults, DEFAULT_CONFIG)
    if (config or default) not in named_entries:
        reason = "none is named" if config is None else f"{config!r} is none of them"
        raise DataError(
            f"{folder}: has the configurations {', '.join(named_entries)}, and {reason}. Choose one by name"
        )
    files = named_entries[config or default]["data_files"]
    splits: dict[Path, list[str]] = {}
    for entry in files if isinstance(files, list) else [files]:
        patterns = entry.get("path") if isinstance(entry, dict) else entry
        split = str(entry.get("split", DEFAULT_SPLIT)) if isinstance(entry, dict) else DEFAULT_SPLIT
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            for file in folder.glob(str(pattern).removeprefix("./")):
                splits.setdefault(file, []).append(split)
    return splits


def _is_saved_set(path: Path) -> bool:
    return path.is_dir() and all((path / name).is_file() for name in SAVED_SET)


def _split_names(path: Path) -> list[str]:
    """Names for the split of a file, from its path in the folder; an empty list if no name says one."""
    shard = SHARD.match(path.name)
    if shard and shard["split"] not in NO_SPLIT:
        return [shard["split"]]
    for name in (_stem(path).name, *reversed(path.parts[:-1])):
        words = [word for word in re.split(r"[-._ 0-9]+", name.lower()) if word in SPLIT_WORDS]
        if words:
            return [SPLIT_WORDS[words[-1]], words[-1], name]
    return []


def _drop_duplicate_forms(folder: Path, files: list[Path]) -> list[Path]:
    """The files without tables, if there are JSON or parquet files that hold the same rows.

    Raises:
        DataError: two files differ in their suffixes alone, so that the same rows would be read twice.
    """
    tables = [file for file in files if file.is_file() and _kind(file) in SEPARATORS]
    if tables and len(tables) < len(files):
        logger.warning("%s: holds JSON or parquet files, so %s is not read", folder, tables[0].name)
        files = [file for file in files if file not in tables]
    stems = Counter(map(_stem, files))
    double = next((stem for stem, count in stems.items() if count > 1), None)
    if double is not None:
        names = [file.name for file in files if _stem(file) == double]
        raise DataError(f"{folder}: {' and '.join(names)} would be the same rows twice; take one of them away")
    return files


def _stem(path: Path) -> Path:
    """The path of a file without the suffixes of its kind and its compression."""
    plain = path.with_suffix("") if path.suffix in DECOMPRESS else path
    return plain.with_suffix("") if _kind(path) else plain


def _kind(path: Path) -> str:
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


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
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
    value = _parse_json(first_line) if first_byte in (b"[", b"{") else None
    is_list = first_byte == b"[" and (isinstance(value, DataError) or is_alone)
    # In a .jsonl a broken first line is a broken row; in a .json it is the beginning of a value of many lines.
    if is_list or (_kind(path) == ".json" and (not isinstance(value, dict) or is_alone)):
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
        value = json.loads(b"".join(lines).decode("utf-8-sig"))
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
            f"{_kind(path)} file is read with {separator!r} between them; write it so, or as .jsonl"
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
