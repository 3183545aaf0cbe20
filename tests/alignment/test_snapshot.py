"""A source that grows is read once: all workers and every resume learn from the rows that the run began with."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from alignment.data.snapshot import keep_live_rows
from alignment.distributed.world import World
from alignment.errors import DataError
from alignment.run_folder import RunFolder
from alignment.settings.data import DataConfig
from tests.alignment.test_train import assert_same_run, run
from tests.alignment.test_workers import train_with
from tests.conftest import pair_rows
from tests.workers import run_two

Settings = dict[str, Any]


def add(database: Path, rows: list[Any]) -> str:
    """Appends judgements as an endpoint's database has them; returns its URL."""
    with sqlite3.connect(database) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS judgements (number INTEGER PRIMARY KEY, row TEXT, superseded_by INTEGER)"
        )
        texts = [(row if isinstance(row, str) else json.dumps(row),) for row in rows]
        connection.executemany("INSERT INTO judgements (row) VALUES (?)", texts)
    connection.close()
    return f"sqlite:///{database}"


@pytest.fixture
def growing(run_settings: Settings, tmp_path: Path) -> Settings:
    """Settings of a run on a database of 24 judgements."""
    url = add(tmp_path / "feedback.sqlite", pair_rows(24))
    return {**run_settings, "data": {**run_settings["data"], "path": url}}


def test_a_run_goes_on_with_the_rows_that_it_began_with(
    growing: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(growing, steps=6, output=str(tmp_path / "whole"), evaluate={"every": 3})
    run(growing, steps=3)
    assert "24 rows of sqlite:///" in capsys.readouterr().out
    add(tmp_path / "feedback.sqlite", pair_rows(30)[24:])
    resumed = run(growing, steps=6, evaluate={"every": 3})
    assert_same_run(whole, resumed)
    told = capsys.readouterr().out
    assert "a run goes on with the rows that it began with" in told and "from 24 rows" in told
    run(growing, steps=1, name="new")
    assert "from 30 rows" in capsys.readouterr().out


def test_workers_read_what_the_main_one_has_written(growing: Settings) -> None:
    ended = run_two(train_with, (growing,), (growing,))
    assert [each.error for each in ended] == [None, None]
    folder = Path(growing["output"]) / "run"
    assert RunFolder(folder).read_metrics()[-1]["step"] == 4
    (file,) = (folder / "data").iterdir()
    assert [json.loads(line) for line in file.read_text().splitlines()] == pair_rows(24)


def test_every_live_source_is_kept_and_no_other_is_touched(tmp_path: Path) -> None:
    url = add(tmp_path / "feedback.sqlite", pair_rows(5))
    file = tmp_path / "pairs.jsonl"
    mixture = [{"path": url, "skip": 1, "take": 3}, {"path": str(file), "take": 2}]
    data = DataConfig.model_validate({"mixture": mixture, "eval": {"path": url}})
    notes: list[str] = []
    kept = keep_live_rows(data, RunFolder(tmp_path), World(), notes.append)
    live, local = kept.mixture
    assert local == data.mixture[1]
    assert live == data.mixture[0].model_copy(update={"path": live.path, "skip": 0, "take": None})
    assert [len(Path(str(source.path)).read_text().splitlines()) for source in (live, kept.eval) if source] == [3, 5]
    assert len(notes) == 2
    assert keep_live_rows(data, RunFolder(tmp_path), World(), notes.append) == kept
    plain = DataConfig(path=str(file))
    assert keep_live_rows(plain, RunFolder(tmp_path), World(), notes.append) is plain


def test_a_broken_row_stays_one_bad_row(growing: Settings, tmp_path: Path) -> None:
    add(tmp_path / "feedback.sqlite", ['{"prompt": '])
    with pytest.raises(DataError, match=r"rows-.*\.jsonl:25: must be a JSON object"):
        run(growing)
    folder = run(growing, data={**growing["data"], "on_bad_row": "skip"}, name="skipping")
    assert len((folder / "bad_rows.jsonl").read_text().splitlines()) == 1


def test_a_source_that_cannot_be_read_leaves_no_file(growing: Settings, tmp_path: Path) -> None:
    data = {**growing["data"], "path": "http://127.0.0.1:9/v1/feedback/export"}
    with pytest.raises(DataError, match="cannot be read"):
        run(growing, data=data)
    assert not list((tmp_path / "runs" / "run" / "data").glob("*.jsonl"))
