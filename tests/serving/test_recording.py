"""Answers that the database does not take at once: none is lost, and none comes back after it was deleted."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from alignment.rewards.remote import ChatMessage
from serving.feedback import recording
from serving.feedback.ids import Ids
from serving.feedback.recording import Recorder
from serving.feedback.store import Store, opening
from serving.feedback.store.records import Feedback, GenerationRecord, RecordedAnswer, Thumb, UnknownId

SECRET = "a text that somebody wants to be gone"


def answer(id: str, text: str = "blue") -> GenerationRecord:
    return GenerationRecord(
        id=id,
        kind="chat",
        prompt=(ChatMessage(role="user", content="The sky is?"),),
        answers=(RecordedAnswer(id=f"{id}-0", text=text, version=1, model="m", finish_reason="stop"),),
        asked_by="anna",
        created=time.time(),
        recorded=True,
    )


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(opening, "WAIT_S", 0.2)
    with closing(Store(f"sqlite:///{tmp_path / 'feedback.sqlite'}")) as opened:
        yield opened


@contextmanager
def recorder(store: Store, folder: Path, **settings: Any) -> Iterator[Recorder]:
    with closing(Recorder(store, folder, **settings)) as made:
        yield made


@contextmanager
def away(folder: Path) -> Iterator[None]:
    """Another program holds the database, for longer than anybody waits."""
    with closing(sqlite3.connect(folder / "feedback.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def wait_until(condition: Any) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def thumb(store: Store, id: str) -> Any:
    return store.record_feedback(Feedback(target=id, verdict=Thumb(up=True), labeller="anna")).result(timeout=60)


def test_what_the_database_does_not_take_is_stored_when_it_is_back(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "RETRY_S", 0.05)
    folder = tmp_path / "unstored"
    with recorder(store, folder) as made:
        with away(tmp_path):
            for number in range(3):
                made.record(answer(f"chatcmpl-{number}"))
            wait_until(lambda: len(list(folder.glob("*.json"))) == 3)
            assert (folder / "chatcmpl-0.json").stat().st_mode & 0o777 == 0o600
            assert made.is_pending("chatcmpl-1", age_s=1e6)
        wait_until(lambda: made.num_waiting == 0)
        assert not made.is_pending("chatcmpl-1", age_s=1e6) and made.is_pending("chatcmpl-1", age_s=1)
    for number in range(3):
        assert thumb(store, f"chatcmpl-{number}-0").note is None
    assert [row.count("blue") for row in store.export()] == [1, 1, 1]


def test_what_a_process_left_behind_is_stored_by_the_next_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "unstored"
    with recorder(store, folder) as first, away(tmp_path):
        first.record(answer("chatcmpl-1"))
        wait_until(lambda: first.num_waiting == 1)
    with pytest.raises(UnknownId):
        thumb(store, "chatcmpl-1")
    monkeypatch.setattr(recording, "RETRY_S", 0.05)
    with recorder(store, folder) as second:
        wait_until(lambda: not list(folder.glob("*.json")))
        assert second.num_waiting in (0, 1)
    thumb(store, "chatcmpl-1")


def test_what_was_deleted_meanwhile_is_not_stored(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "unstored"
    with recorder(store, folder) as made:
        with away(tmp_path):
            made.record(answer("chatcmpl-1"))
            wait_until(lambda: made.num_waiting == 1)
        assert made.discard("chatcmpl-1") and not made.discard("chatcmpl-1")
        assert not made.discard("../../etc/passwd")
        assert not made.is_pending("chatcmpl-1", age_s=1) and not made.is_pending("chatcmpl-1-0", age_s=1)
        assert made.is_pending("chatcmpl-10", age_s=1)
    assert not list(folder.glob("*.json"))


def test_what_was_cut_off_is_remembered_by_its_group(store: Store, tmp_path: Path) -> None:
    with recorder(store, tmp_path / "unstored") as made:
        made.cut_off("chatcmpl-1")
        assert made.was_cut_off("chatcmpl-1") and made.was_cut_off("chatcmpl-1-0")
        assert not made.was_cut_off("chatcmpl-10") and not made.was_cut_off("chatcmpl")


def test_a_file_that_cannot_be_read_does_not_keep_the_others(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lost = tmp_path / "unstored", []
    with recorder(store, folder) as made, away(tmp_path):
        made.record(answer("chatcmpl-1"))
        wait_until(lambda: made.num_waiting == 1)
    (folder / "chatcmpl-0.json").write_text("{")
    monkeypatch.setattr(recording, "RETRY_S", 0.05)
    with recorder(store, folder, on_loss=lost.append):
        wait_until(lambda: not list(folder.glob("*.json")))
    assert lost == ["refused"]
    thumb(store, "chatcmpl-1")


def test_a_full_spool_loses_what_comes_next_and_says_so(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MAX_FILES", 1)
    lost: list[str] = []
    with recorder(store, tmp_path / "unstored", on_loss=lost.append) as made, away(tmp_path):
        made.record(answer("chatcmpl-1"))
        made.record(answer("chatcmpl-2"))
        wait_until(lambda: lost)
    assert lost == ["too many wait"]


def test_ids_are_known_by_every_process_of_an_endpoint_and_by_nobody_else(tmp_path: Path) -> None:
    ids, others = Ids(tmp_path / "here"), Ids(tmp_path / "elsewhere")
    id = f"chatcmpl-{ids.issue()}"
    assert len({ids.issue() for _ in range(1000)}) == 1000
    for known in (id, f"{id}-0", f"{id}-15"):
        age_s = Ids(tmp_path / "here").age_s(known)
        assert age_s is not None and 0 <= age_s < 60
    changed = id[:-1] + ("0" if id[-1] != "0" else "1")
    for unknown in ("chatcmpl-abc", f"{id}-x", f"x{id}", id.upper(), changed, "chatcmpl-" + "0" * 32, ""):
        assert ids.age_s(unknown) is None
    assert others.age_s(id) is None
    assert (tmp_path / "here" / "ids.key").stat().st_mode & 0o777 == 0o600


def test_deleted_texts_are_in_none_of_the_databases_files(store: Store, tmp_path: Path) -> None:
    store.record(answer("chatcmpl-1", SECRET)).result(timeout=60)
    thumb(store, "chatcmpl-1")
    assert any(SECRET.encode() in file.read_bytes() for file in tmp_path.glob("feedback.sqlite*"))
    assert store.delete("chatcmpl-1").result(timeout=60) == 3
    assert [file.name for file in tmp_path.glob("feedback.sqlite*") if SECRET.encode() in file.read_bytes()] == []
