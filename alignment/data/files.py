"""Which files of a folder hold rows of the split that is asked for, and the rows of a file of any kind.

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
    """A text of a table, in which numbers, true and false, and lists as JSON are texts too."""


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
"""What a damaged compressed file raises."""
SEPARATORS = {".csv": ",", ".tsv": "\t"}
SAVED_SET = ("dataset_info.json", "state.json")
"""Files that a folder of `datasets`' save_to_disk has, beside its .arrow files."""
NO_DATA = (*SAVED_SET, "dataset_infos.json", "dataset_dict.json", "config.json")
"""Files that describe a set."""
CONTAINERS = ("data", "rows", "examples", "instances", "records", "items")
"""Keys under which a JSON object keeps its rows."""
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in the names of files and folders, and the split that they mean, as in `datasets`."""
SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
NO_SPLIT = ("part", "data", "shard", "chunk", "file", "output", "batch")
"""What shards are called that belong to no split."""
DEFAULT_SPLIT, DEFAULT_CONFIG = "train", "default"
csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # by default a cell has 131,072 characters at most


def data_files(folder: Path, split: str, config: str | None = None) -> list[Path]:
    """Files, and folders of saved sets, that hold a split's rows, in the order of their names.

    The README of a set from the hub says which files are a split's. Without one, names do: `train.jsonl`,
    `train-00000-of-00001.parquet`, `my_test.csv`, `train/a.jsonl`. Where no name says any, the split `train` is
    everything.

    Args:
        split: one of those, or several as `train+test`.
        config: configuration of a set that has several, as `data.name` says it: one of the README's, or a folder.

    Raises:
        DataError: there are no rows of that split; the text names the splits that there are.
    """
    declared = _declared_splits(folder, config)
    if not declared and config is not None:
        if not (folder / config).is_dir() and config != DEFAULT_CONFIG:
            raise DataError(f"{folder}: has no configuration {config!r}: neither its README nor a folder is called so")
        folder = folder / config if (folder / config).is_dir() else folder
    files = _data_files(folder)
    if not files:
        raise DataError(f"{folder}: holds no file of a known kind ({KINDS})")
    splits = {file: declared.get(file, []) if declared else _splits(file.relative_to(folder)) for file in files}
    if not any(splits.values()):
        if split != DEFAULT_SPLIT:
            raise DataError(f"{folder}: has no split {split!r}: its files' names say no split")
        return _of_one_form(folder, files)
    wanted: set[Path] = set()
    for name in split.split("+"):
        matching = [file for file in files if name in splits[file]]
        if not matching:
            known = sorted({names[0] for names in splits.values() if names})
            raise DataError(f"{folder}: has no split {name!r}; there are {', '.join(known)}. Choose one by split")
        wanted.update(matching)
    unnamed = [file.name for file in files if not splits[file]]
    if unnamed:
        logger.warning("%s: the names of %s say no split, so they are not read", folder, ", ".join(unnamed[:3]))
    return _of_one_form(folder, [file for file in files if file in wanted])


def read_file(path: Path, split: str = DEFAULT_SPLIT) -> Rows:
    """The rows of a file, or of a saved set.

    Args:
        split: which of the splits of a JSON object that holds several.

    Raises:
        DataError: it cannot be read at all.
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
    """Whether a name is that of a file of a known kind."""
    return str(path).endswith(SUFFIXES)


def says_split(path: Path, split: str) -> bool:
    """Whether a file that is given by itself can be read as a split: each as `train`, and a .json may hold several."""
    names = [DEFAULT_SPLIT, *_splits(Path(path.name))]
    return _kind(path) == ".json" or all(part in names for part in split.split("+"))


def _data_files(folder: Path) -> list[Path]:
    files = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith((".", "__", "_delta_log")) for part in parts) or path.name in NO_DATA:
            continue
        if _is_saved_set(path) or (path.is_file() and is_data_file(path)):
            files.append(path)
    return [folder] if _is_saved_set(folder) else files


def _declared_splits(folder: Path, config: str | None) -> dict[Path, list[str]]:
    """Splits of files by the `configs` in the head of a README, as the hub reads it; empty if it says nothing.

    Raises:
        DataError: it has several configurations, and `config` is none of them.
    """
    readme = folder / "README.md"
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---", 2) if readme.is_file() else []
    try:
        head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return {}
    configs = head.get("configs") if isinstance(head, dict) else None
    entries = [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []
    named = {str(entry.get("config_name", DEFAULT_CONFIG)): entry for entry in entries if entry.get("data_files")}
    if not named:
        return {}
    default = next((name for name, entry in named.items() if entry.get("default") or len(named) == 1), DEFAULT_CONFIG)
    if (config or default) not in named:
        asked = "none is named" if config is None else f"{config!r} is none of them"
        raise DataError(f"{folder}: has the configurations {', '.join(named)}, and {asked}. Choose one by name")
    files = named[config or default]["data_files"]
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


def _splits(path: Path) -> list[str]:
    """What the split of a file may be called, from its path in the folder; nothing if no name says."""
    shard = SHARD.match(path.name)
    if shard and shard["split"] not in NO_SPLIT:
        return [shard["split"]]
    for name in (_stem(path).name, *reversed(path.parts[:-1])):
        words = [word for word in re.split(r"[-._ 0-9]+", name.lower()) if word in SPLIT_WORDS]
        if words:
            return [SPLIT_WORDS[words[-1]], words[-1], name]
    return []


def _of_one_form(folder: Path, files: list[Path]) -> list[Path]:
    """The files without those that keep the same rows in another form: tables beside JSON or parquet, and doubles."""
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
    """A file without the suffixes of its kind and compression."""
    plain = path.with_suffix("") if path.suffix in DECOMPRESS else path
    return plain.with_suffix("") if _kind(path) else plain


def _kind(path: Path) -> str:
    """Suffix of a file without that of its compression; empty for a saved set."""
    kind = path.with_suffix("").suffix if path.suffix in DECOMPRESS else path.suffix
    return kind if kind in (*TEXTS, ".parquet") else ""


def _open(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, DECOMPRESS[path.suffix](path)) if path.suffix in DECOMPRESS else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def parse_line(line: bytes) -> Row | DataError:
    """The JSON object of a line."""
    row = _parse(line)
    return row if isinstance(row, dict | DataError) else DataError(f"must be a JSON object, not {type(row).__name__}")


def _parse(line: bytes) -> Any:
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
    """JSON lines, or one JSON value that holds all rows: which of them is seen in the first line, not in the name."""
    head, lines = _peeked(file)
    first = next((line for line in head if line.strip()), b"")
    is_alone = len(head) < 2 or not head[-1].strip() or head[-1] is first
    begins = first.lstrip()[:1]
    value = _parse(first) if begins in (b"[", b"{") else None
    is_list = begins == b"[" and (isinstance(value, DataError) or is_alone)
    # In a .jsonl a broken first line is a broken row; in a .json it is the beginning of a value of many lines.
    if is_list or (_kind(path) == ".json" and (not isinstance(value, dict) or is_alone)):
        yield from _read_value(path, lines, split)
    else:
        yield from _read_lines(path, lines)


def _peeked(file: BinaryIO) -> tuple[list[bytes], Iterator[bytes]]:
    """The lines of a file up to the second that is not blank, and all its lines, which raise what reading raises."""
    head: list[bytes] = []
    damage = None
    try:
        for line in file:
            head.append(line if head else line.removeprefix(b"\xef\xbb\xbf"))
            if sum(bool(line.strip()) for line in head) == 2:
                break
    except DAMAGE as error:
        damage = error
    return head, chain(head, _raising(damage) if damage else file)


def _raising(error: Exception) -> Iterator[bytes]:
    raise error
    yield b""


def _read_lines(path: Path, lines: Iterable[bytes]) -> Rows:
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", parse_line(line)
    except DAMAGE as error:
        yield f"{path}:{number + 1}", _damaged(error)


def _damaged(error: Exception) -> DataError:
    return DataError(f"the compressed file is damaged from here on ({error})")


def _read_value(path: Path, lines: Iterable[bytes], split: str) -> Rows:
    try:
        value = json.loads(b"".join(lines).decode("utf-8-sig"))
    except (ValueError, RecursionError, *DAMAGE) as error:
        raise DataError(f"{path}: is not valid JSON: {error}") from error
    for number, row in enumerate(_rows_of(value, path, split), start=1):
        yield f"{path}:{number}", row if isinstance(row, dict) else DataError("must be a JSON object")


def _rows_of(value: Any, path: Path, split: str) -> list[Any]:
    """The rows of a JSON value: a list, an object with the list, an object of columns, or a row alone."""
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
    """Rows of a table with a header; every cell is a text, an empty one is null. A cell may hold line breaks."""
    marks = chain(["\ufeff"], repeat(""))  # some programs begin a file with one
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
            yield f"{path}:{line}", _damaged(error)
            return
        if not any(cells):
            continue
        if header:
            yield f"{path}:{line}", _row_of(header, cells)
        else:
            header = _header(path, cells, separator)


def _header(path: Path, cells: list[str], separator: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not "".join(names).isprintable():
        raise DataError(f"{path}: does not begin with the names of columns in UTF-8; save it as UTF-8")
    other = next((sign for sign in (";", "\t", "|", ",") if sign in cells[0] and len(cells) == 1), None)
    if other is not None:
        raise DataError(
            f"{path}: its first line, {cells[0]!r:.80}, seems to separate columns by {other!r}, and a {_kind(path)} "
            f"file is read with {separator!r} between them; write it so, or as .jsonl"
        )
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None or "" in names[1:]:
        raise DataError(f"{path}: the first line must name every column once, and {twice or ''!r} does not")
    return names


def _row_of(header: list[str], cells: list[str]) -> Row | DataError:
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
