"""Rows from files: every kind of file, the origin of every row, and broken rows as errors in their place."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignment.config import SourceConfig
from alignment.data.sources import Row, read_rows
from alignment.errors import DataError

WriteRows = Callable[..., Path]
ROWS: list[Row] = [{"prompt": f"question {i}", "chosen": "yes é", "rejected": "no"} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read(path: Path | str, **settings: Any) -> list[tuple[str, Row | DataError]]:
    return list(read_rows(SourceConfig(path=str(path), **settings)))


def numbered(path: Path, rows: list[Row] = ROWS) -> list[tuple[str, Row]]:
    return [(f"{path}:{number}", row) for number, row in enumerate(rows, start=1)]


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize(
    "text",
    [LINES, "\ufeff" + LINES, LINES.replace("\n", "\r\n"), LINES.rstrip("\n"), "\ufeff" + LINES.replace("\n", "\r\n")],
    ids=["plain", "BOM", "CRLF", "no last line break", "BOM and CRLF"],
)
def test_json_lines_are_read_as_every_editor_writes_them(tmp_path: Path, name: str, text: str) -> None:
    path = write_bytes(tmp_path / name, text.encode())
    assert read(path) == numbered(path)


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "BOM"])
def test_a_json_list_is_read(tmp_path: Path, name: str, start: str) -> None:
    path = write_bytes(tmp_path / name, (start + json.dumps(ROWS)).encode())
    assert read(path) == numbered(path)


def test_parquet_is_read_with_its_lists_of_messages(tmp_path: Path) -> None:
    rows = [{**row, "messages": [{"role": "user", "content": "hello"}]} for row in ROWS]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    assert read(path) == numbered(path, rows)


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "rows.jsonl", b'\n{"a": 1}\n   \n\r\n{"a": 2}\n\n')
    assert read(path) == [(f"{path}:2", {"a": 1}), (f"{path}:5", {"a": 2})]


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    second = write_bytes(tmp_path / "more" / "b.jsonl.gz", b'{"n": 2}\n{"n": 3}\n')
    first = write_bytes(tmp_path / "a.json", b'[{"n": 1}]')
    write_bytes(tmp_path / "README.md", b"not data")
    expected = [(f"{first}:1", {"n": 1}), (f"{second}:1", {"n": 2}), (f"{second}:2", {"n": 3})]
    assert read(tmp_path) == expected
    assert read(tmp_path, skip=1, take=1) == expected[1:2]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"skip": 2}, [2, 3, 4]),
        ({"take": 2}, [0, 1]),
        ({"skip": 1, "take": 3}, [1, 2, 3]),
        ({"skip": 9}, []),
        ({"take": 9}, [0, 1, 2, 3, 4]),
    ],
)
def test_skip_and_take_cut_the_rows_and_keep_their_line_numbers(
    write_rows: WriteRows, settings: dict[str, int], kept: list[int]
) -> None:
    path = write_rows(ROWS)
    assert read(path, **settings) == [numbered(path)[index] for index in kept]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": 1,', "is not valid JSON: Expecting property name enclosed in double quotes at character"),
        (b"{'a': 1}", "is not valid JSON: Expecting property name"),
        (b'{"a": 1}{"a": 2}', "is not valid JSON: Extra data at character 8"),
        (b'{"a": "tab\there"}', "is not valid JSON: Invalid control character at character 10"),
        (b"\x00\x00", "is not valid JSON"),
        (b"[1, 2]", "must be a JSON object, not list"),
        (b'"text"', "must be a JSON object, not str"),
        (b"null", "must be a JSON object, not NoneType"),
        (b'{"a": "\xff\xfe"}', "is not valid UTF-8 at byte 7 of the line"),
        ('\ufeff{"a": 1}'.encode(), "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read: Exceeds the limit"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "is nested too deeply"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_broken_line_stands_in_its_place_as_an_error(tmp_path: Path, line: bytes, expected: str) -> None:
    path = write_bytes(tmp_path / "rows.jsonl", b'{"a": 0}\n' + line + b'\n{"a": 3}\n')
    first, (origin, error), last = read(path)
    assert (first, last) == ((f"{path}:1", {"a": 0}), (f"{path}:3", {"a": 3}))
    assert origin == f"{path}:2"
    assert isinstance(error, DataError)
    assert str(error).startswith(expected)
    assert len(str(error)) < 300


def test_a_line_of_five_megabytes_is_read(tmp_path: Path) -> None:
    text = "word " * 1_000_000
    path = write_bytes(tmp_path / "rows.jsonl", json.dumps({"text": text}).encode() + b'\n{"text": "short"}\n')
    assert read(path) == [(f"{path}:1", {"text": text}), (f"{path}:2", {"text": "short"})]


def test_a_truncated_gz_gives_its_whole_lines_and_then_one_error(tmp_path: Path) -> None:
    rows = [{"n": i, "noise": os.urandom(40).hex()} for i in range(2000)]
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    path.write_bytes(whole[: len(whole) // 2])
    *good, (origin, error) = read(path)
    assert good == numbered(path, rows[: len(good)])
    assert 500 < len(good) < 1500
    assert origin == f"{path}:{len(good) + 1}"
    assert isinstance(error, DataError)
    assert "the compressed file is damaged from here on" in str(error)


@pytest.mark.parametrize("damage", ["not gzip", "flipped"])
def test_a_damaged_gz_is_an_error_and_no_crash(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rows.jsonl.gz"
    packed = bytearray(gzip.compress(LINES.encode()))
    packed[len(packed) // 2] ^= 0xFF
    path.write_bytes(LINES.encode() if damage == "not gzip" else bytes(packed))
    error = read(path)[-1][1]
    assert isinstance(error, DataError)
    assert "the compressed file is damaged" in str(error) or "is not valid" in str(error)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.json", b'{"a": 1}', "must be a JSON list of objects, not dict"),
        ("rows.json", b'[{"a": 1}', "is not valid JSON"),
        ("rows.json", b"[" * 200_000, "is not valid JSON"),
        ("rows.json", b"\xff\xfe", "is not valid JSON"),
        ("rows.parquet", b"PAR1 and nothing more", "is not a readable parquet file"),
        ("rows.parquet", b"", "is not a readable parquet file"),
        ("rows.csv", b"a,b\n", "unknown kind of file; known are .jsonl, .jsonl.gz, .json, .json.gz, .parquet"),
    ],
)
def test_an_unreadable_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: {expected}")


def test_a_truncated_gz_of_one_json_list_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS).encode())[:-12])
    with pytest.raises(DataError, match=r"rows\.json\.gz: is not valid JSON"):
        read(path)


def test_an_element_of_a_json_list_that_is_no_object_is_a_broken_row(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "rows.json", b'[{"a": 1}, 2]')
    (_, row), (origin, error) = read(path)
    assert (row, origin, str(error)) == ({"a": 1}, f"{path}:2", "must be a JSON object")


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/file", "pairs.jsonl", "data/pairs.parquet"])
def test_a_missing_file_says_where_it_was_looked_for(path: str) -> None:
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == f"data file {path} does not exist (looked from {Path.cwd()})"


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    write_bytes(tmp_path / "notes.txt", b"nothing here")
    with pytest.raises(DataError, match="holds no file of a known kind"):
        read(tmp_path)


def test_a_file_that_may_not_be_read_is_refused_by_name(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "rows.jsonl", b"{}\n")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root may read every file")
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be read: Permission denied"):
        read(path)


def test_a_hub_that_cannot_be_reached_is_a_short_error_and_no_wait(tmp_path: Path) -> None:
    code = (
        "from alignment.config import SourceConfig\n"
        "from alignment.data.sources import read_rows\n"
        "from alignment.errors import DataError\n"
        "import datasets, time\n"
        "start = time.monotonic()\n"
        "try:\n    list(read_rows(SourceConfig(path='nobody/no-such-set')))\n"
        "except DataError as error:\n    print(time.monotonic() - start, error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    started = time.monotonic()
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    seconds, _, text = told.stdout.partition(" ")
    assert float(seconds) < 10, f"of {time.monotonic() - started:.0f} s in all"
    assert text.startswith(
        "nobody/no-such-set: is neither a local file nor a dataset that can be loaded from the hub: "
    )
    assert "offline" in text.lower() or "reach" in text.lower()
    assert len(text) < 600
