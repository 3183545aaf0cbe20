"""Rows from files: every kind of file, the origin of every row, and broken rows as errors in their place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError

from alignment.data import sources
from alignment.data.files import Row
from alignment.data.sources import read_rows
from alignment.errors import DataError
from alignment.settings.data import SourceConfig

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
        ("rows.json", b"5", "must be a JSON list of objects, not int"),
        ("rows.json", b'{"train": [{"a": 1}], "test": [{"a": 2}]}', "has no split 'dev'; there are train, test."),
        ("rows.json", b'[{"a": 1}', "is not valid JSON"),
        ("rows.json", b"[" * 200_000, "is not valid JSON"),
        ("rows.json", b"\xff\xfe", "is not valid JSON"),
        ("rows.parquet", b"PAR1 and nothing more", "is not a readable parquet file"),
        ("rows.parquet", b"", "is not a readable parquet file"),
        ("rows.json", b'{"a": [1, 2], "b": [1]}', "its columns have different lengths: {'a': 2, 'b': 1}"),
        ("rows.csv", b"a;b\n1;2\n", "its first line, 'a;b', seems to separate columns by ';', and a .csv file is read"),
        ("rows.tsv", b"a,b\n1,2\n", "its first line, 'a,b', seems to separate columns by ','"),
        ("rows.csv", b"a,b,a\n1,2,3\n", "the first line must name every column once, and 'a' does not"),
        ("rows.csv", "a,b\n1,2\n".encode("utf-16"), "does not begin with the names of columns in UTF-8"),
        (
            "rows.xlsx",
            b"PK",
            "unknown kind of file; known are .jsonl, .ndjson, .json, .csv, .tsv (each also .gz, .bz2, .xz, ",
        ),
    ],
)
def test_an_unreadable_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path, split="dev" if path.suffix == ".json" else "train")
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


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_row_that_has_a_key_twice_is_refused_by_the_name_of_the_key(tmp_path: Path, name: str) -> None:
    twice = '{"prompt": "p", "completion": "first", "completion": "second"}'
    nested = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    path = write_bytes(tmp_path / name, f"{twice}\n{LINES}{nested}\n".encode())
    (_, first), *rows, (_, last) = read(path)
    assert str(first) == "an object has the key 'completion' twice, and only one of its values could be read"
    assert [row for _, row in rows] == ROWS
    assert isinstance(last, DataError) and "the key 'content' twice" in str(last)


def test_a_json_list_with_a_key_twice_is_refused_by_the_name_of_the_key(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "rows.json", b'[{"prompt": "p",\n "prompt": "q"}]')
    with pytest.raises(DataError, match=r"rows\.json: an object has the key 'prompt' twice"):
        read(path)


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
        "from alignment.settings.data import SourceConfig\n"
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
    assert float(seconds) < 40, f"of {time.monotonic() - started:.0f} s in all"
    assert text.startswith(
        "nobody/no-such-set: is neither a local file nor a dataset that can be loaded from the hub: "
    )
    assert "offline" in text.lower() or "reach" in text.lower()
    assert len(text) < 600


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz", "rows.ndjson"])
@pytest.mark.parametrize(
    "text",
    [
        LINES,
        "\n" + LINES,
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        json.dumps(ROWS[:1]) + "\n",
        json.dumps(ROWS[0]),
    ],
    ids=["lines", "a blank line first", "list", "list of many lines", "list of one", "one row"],
)
def test_what_a_json_file_holds_is_seen_in_its_text_and_not_in_its_name(tmp_path: Path, name: str, text: str) -> None:
    path = write_bytes(tmp_path / name, text.encode())
    assert [row for _, row in read(path)] == (ROWS[:1] if text.count("question") == 1 else ROWS)


@pytest.mark.parametrize(
    "value",
    [
        {"version": 2, "data": ROWS},
        {"train": ROWS, "test": [{"prompt": "another"}]},
        {name: [row[name] for row in ROWS] for name in ROWS[0]},
        {name: {str(number): row[name] for number, row in enumerate(ROWS)} for name in ROWS[0]},
    ],
    ids=["under a key", "splits", "columns", "columns of pandas"],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_rows_in_a_json_object_are_found(tmp_path: Path, value: Row, indent: int | None) -> None:
    path = write_bytes(tmp_path / "rows.json", json.dumps(value, indent=indent).encode())
    assert read(path) == numbered(path)


def test_a_row_whose_fields_are_lists_is_a_row_and_no_table(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}]
    row = {"prompt": turns, "chosen": [{"role": "assistant", "content": "a"}], "rejected": turns}
    path = write_bytes(tmp_path / "rows.json", json.dumps(row, indent=1).encode())
    assert read(path) == [(f"{path}:1", row)]


@pytest.mark.parametrize("name", ["rows.jsonl.bz2", "rows.jsonl.xz", "rows.jsonl.zst", "rows.csv.gz", "rows.tsv.zst"])
def test_files_are_read_through_their_compression(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    separator = {".csv": ",", ".tsv": "\t"}.get(path.suffixes[0])
    lines = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    text = LINES if separator is None else "\n".join(separator.join(line) for line in lines)
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": pa.Codec("zstd").compress}
    path.write_bytes(bytes(packed[path.suffix](text.encode())))
    first = 1 if separator is None else 2
    assert read(path) == [(f"{path}:{number}", row) for number, row in enumerate(ROWS, start=first)]
    path.write_bytes(path.read_bytes()[:-9])
    assert any(isinstance(row, DataError) and "damaged" in str(row) for _, row in read(path))


def test_a_table_is_read_with_quoted_line_breaks_a_bom_and_the_line_of_every_row(tmp_path: Path) -> None:
    text = '\ufeffprompt,chosen,rejected\r\n"Two\r\nlines, ""quoted""",42,\r\n\r\nlast,yes,no\r\n'
    path = write_bytes(tmp_path / "rows.csv", text.encode())
    assert read(path) == [
        (f"{path}:2", {"prompt": 'Two\r\nlines, "quoted"', "chosen": "42", "rejected": None}),
        (f"{path}:5", {"prompt": "last", "chosen": "yes", "rejected": "no"}),
    ]


def test_a_row_of_a_table_that_cannot_be_read_stands_in_its_place_as_an_error(tmp_path: Path) -> None:
    content = b'a,b\n1,2\n1,2,3\n1\n"x"y,2\n\xff,2\n5,6\n"never closed,7\n8,9\n'
    path = write_bytes(tmp_path / "rows.csv", content)
    told = [(origin.rpartition(":")[2], row if isinstance(row, dict) else str(row)) for origin, row in read(path)]
    assert told == [
        ("2", {"a": "1", "b": "2"}),
        ("3", "has 3 cells, and the first line names 2 columns"),
        ("4", "has 1 cells, and the first line names 2 columns"),
        ("5", "is not a row of cells: ',' expected after '\"'"),
        ("6", "is not valid UTF-8 in column 'a'"),
        ("7", {"a": "5", "b": "6"}),
        ("8", "is not a row of cells: unexpected end of data"),
    ]


def test_a_cell_of_a_megabyte_is_read(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "rows.csv", b"a,b\n" + b"word " * 200_000 + b",2\n")
    assert len(read(path)[0][1]["a"]) == 1_000_000  # type: ignore[index]


def write_files(folder: Path, *names: str) -> Path:
    """Files of one row each, which says the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([{"name": name}]), path)
        elif path.suffix == ".csv":
            path.write_text(f"name\n{name}\n")
        else:
            path.write_text(json.dumps({"name": name}) + "\n")
    return folder


def names_in(folder: Path, **settings: Any) -> list[str]:
    return [row["name"] for _, row in read(folder, **settings)]  # type: ignore[index]


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "train", "data/train-00000-of"),
        (["train.jsonl", "test.jsonl"], "test", "test.jsonl"),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], "train", "train/a.jsonl train/b.jsonl"),
        (["harmless.train.jsonl", "harmless.test.jsonl"], "train", "harmless.train.jsonl"),
        (["Training_Data.jsonl", "my-dev-set.jsonl"], "train", "Training_Data.jsonl"),
        (["val.jsonl", "train.jsonl"], "validation", "val.jsonl"),
        (["val.jsonl", "train.jsonl"], "val", "val.jsonl"),
        (["eval.csv", "train.csv"], "eval", "eval.csv"),
        (["train_sft-00000-of-00002.jsonl", "train_sft-00001-of-00002.jsonl", "test_sft-00000-of-00001.jsonl"],
         "train_sft", "train_sft-00000-of-00002.jsonl train_sft-00001-of-00002.jsonl"),
        (["train.jsonl", "test.jsonl", "val.jsonl"], "test+train", "test.jsonl train.jsonl"),
        (["a.jsonl", "b/c.jsonl"], "train", "a.jsonl b/c.jsonl"),
        (["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"], "train", "part-00000-of-00002.jsonl part-00001"),
        (["contest.jsonl", "restraint.jsonl"], "train", "contest.jsonl restraint.jsonl"),
        (["a.jsonl", "numbers.csv"], "train", "a.jsonl"),
        (["v1.jsonl/a.json", "v1.jsonl/b.json"], "train", "v1.jsonl/a.json v1.jsonl/b.json"),
    ],
)  # fmt: skip
def test_a_folder_is_read_by_split_as_the_hub_reads_it(
    tmp_path: Path, files: list[str], split: str, expected: str
) -> None:
    told = " ".join(names_in(write_files(tmp_path, *files), split=split))
    assert told.startswith(expected) and len(told.split()) == len(expected.split())


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl"], "validation", "has no split 'validation'; there are test, train. Choose one"),
        (["train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl"], "train",
         "has no split 'train'; there are test_sft, train_sft."),
        (["test/a.jsonl"], "train", "has no split 'train'; there are test."),
        (["a.jsonl", "b.jsonl"], "test", "has no split 'test': its files' names say no split"),
        (["train.jsonl", "test.jsonl"], "train[:10%]", "has no split 'train[:10%]'; there are test, train."),
        (["train.jsonl", "train.json"], "train", "train.json and train.jsonl would be the same rows twice"),
        ([".hidden.jsonl", "__MACOSX/._rows.jsonl"], "train", "holds no file of a known kind"),
    ],
)  # fmt: skip
def test_a_split_that_a_folder_has_not_is_refused_with_those_that_it_has(
    tmp_path: Path, files: list[str], split: str, expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        names_in(write_files(tmp_path, *files), split=split)
    assert str(caught.value).startswith(f"{tmp_path}: {expected}")


def test_files_that_are_hidden_or_describe_a_set_are_no_data(tmp_path: Path) -> None:
    folder = write_files(tmp_path, "a.jsonl", "._a.jsonl", ".git/x.json", "__MACOSX/a.jsonl", ".b.jsonl")
    for name in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json"):
        (folder / name).write_text('{"description": 5}')
    assert names_in(folder) == ["a.jsonl"]


def test_the_readme_of_a_set_from_the_hub_says_which_files_a_split_has(tmp_path: Path) -> None:
    files = ["main/train-00000-of-00001.jsonl", "main/test-00000-of-00001.jsonl", "socratic/train-00000-of-00001.jsonl"]
    folder = write_files(tmp_path, *files)
    head = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in splits]}
        for name, splits in {"main": ("train", "test"), "socratic": ("train",)}.items()
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': head})}---\n# Set\n")
    assert names_in(folder, name="main") == files[:1]
    assert names_in(folder, name="main", split="test") == files[1:2]
    with pytest.raises(DataError, match=r"the configurations main, socratic, and none is named\. Choose one by name"):
        names_in(folder)
    (folder / "README.md").unlink()
    assert names_in(folder, name="socratic") == files[2:], "without a README, a folder of that name"
    assert names_in(folder, data_dir="main", name="default") == files[:1]
    for settings, why in (
        ({"name": "other"}, "no configuration 'other'"),
        ({"data_dir": "other"}, "no folder 'other'"),
    ):
        with pytest.raises(DataError, match=why):
            names_in(folder, **settings)


def test_a_pattern_reads_the_files_that_it_matches(tmp_path: Path) -> None:
    write_files(tmp_path, "a-1.jsonl", "a-2.jsonl", "b.jsonl", "deep/a-3.jsonl")
    assert names_in(tmp_path / "a-*.jsonl") == ["a-1.jsonl", "a-2.jsonl"]
    assert names_in(tmp_path / "**" / "a-*.jsonl") == ["a-1.jsonl", "a-2.jsonl", "deep/a-3.jsonl"]
    with pytest.raises(DataError, match="matches no file of a known kind"):
        names_in(tmp_path / "c-*.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_save_to_disk_are_read_by_split(tmp_path: Path, streaming: bool) -> None:
    import datasets

    parts = {
        name: datasets.Dataset.from_list([{"name": f"{name}-{i}"} for i in range(2)]) for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    assert names_in(tmp_path / "set", streaming=streaming) == ["train-0", "train-1"]
    assert names_in(tmp_path / "set", split="test") == ["test-0", "test-1"]
    assert names_in(tmp_path / "set" / "test") == ["test-0", "test-1"], "a single one is everything"
    with pytest.raises(DataError, match="has no split 'dev'; there are test, train"):
        names_in(tmp_path / "set", split="dev")


def test_a_file_given_by_itself_is_any_split_that_its_name_does_not_deny(tmp_path: Path) -> None:
    write_files(tmp_path, "rows.jsonl", "test.jsonl")
    assert names_in(tmp_path / "test.jsonl") == names_in(tmp_path / "test.jsonl", split="test") == ["test.jsonl"]
    for name in ("rows.jsonl", "test.jsonl"):
        with pytest.raises(DataError, match="is one file, whose name says nothing of the split 'validation'"):
            names_in(tmp_path / name, split="validation")


def test_the_last_part_of_a_name_says_the_kind_of_a_file(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "rows.json.csv", b"a,b\n1,2\n")
    assert read(path) == [(f"{path}:2", {"a": "1", "b": "2"})]


def counted_rows(source: SourceConfig) -> Iterator[Any]:
    """A source of one's own."""
    yield {"prompt": source.split, "completion": "1"}
    yield {"prompt": "b", "completion": "2"}
    yield "no row"
    raise OSError("gone")


def test_a_source_of_ones_own_yields_rows() -> None:
    name = "tests.alignment.test_sources:counted_rows"
    assert list(read_rows(SourceConfig(path=name, take=2))) == [
        (f"{name}:1", {"prompt": "train", "completion": "1"}),
        (f"{name}:2", {"prompt": "b", "completion": "2"}),
    ]
    rows = read_rows(SourceConfig(path=name, skip=2))
    origin, problem = next(rows)
    assert origin == f"{name}:3"
    assert isinstance(problem, DataError)
    with pytest.raises(DataError, match=r"OSError\('gone'\) after row 3"):
        next(rows)
    with pytest.raises(ValidationError, match="has no attribute 'counted_row'; did you mean 'counted_rows'"):
        SourceConfig(path="tests.alignment.test_sources:counted_row")


def test_an_entry_of_the_table_is_a_kind_of_source(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = sources.SourceKind(
        matches=lambda path: path.startswith("counted://"), read=lambda _, source: counted_rows(source)
    )
    monkeypatch.setattr(sources, "SOURCES", {"counted": kind, **sources.SOURCES})
    assert len(list(read_rows(SourceConfig(path="counted://two", take=2)))) == 2
