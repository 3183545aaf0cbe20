"""The feedback database: nothing acknowledged is lost or doubled, and nothing that was not asked for is kept."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from alignment.data.shapes import to_group
from alignment.errors import ServingError
from alignment.groups import Message
from alignment.settings.data import SourceConfig
from serving.feedback import store as stores
from serving.feedback.store import Store
from serving.feedback.store import writer as writing
from serving.feedback.store.opening import WRITES, engine_of, lock, prepare
from serving.feedback.store.records import (
    Agreement,
    BadVerdict,
    Choice,
    Conflict,
    Correction,
    Feedback,
    GenerationRecord,
    Ranking,
    Receipt,
    RecordedAnswer,
    StoreAway,
    StoreError,
    StoreFull,
    Thumb,
    UnknownId,
    Verdict,
    Wins,
)
from serving.feedback.store.tables import metadata
from tests.databases import connection_to, new_schema
from tests.serving.feedback_writer import ITEMS, WRITERS

NASTY = "a\x00b\x1b[31m\u2028\x85\ud800<script>alert(1)</script>'; DROP TABLE groups; --\r\n\t\"{} é 😀"
PROMPT = (Message(role="system", content="Be brief."), Message(role="user", content="Hello?"))


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    opened = Store(database)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'feedback.sqlite'}"


ENDS = ("stop", "length", None)
"""Why the first, second and third answer of a group ended."""


def opened_engine(url: str) -> sa.Engine:
    engine = engine_of(url)
    prepare(engine)
    return engine


def issued(id: str = "cmp-1", *, texts: tuple[str, ...] = ("yes", "no"), **settings: Any) -> GenerationRecord:
    versions = settings.pop("versions", range(1, len(texts) + 1))
    answers = tuple(
        RecordedAnswer(id=f"{id}-{index}", text=text, version=version, model="m", finish_reason=ENDS[index % 3])
        for index, (text, version) in enumerate(zip(texts, versions, strict=True))
    )
    known: dict[str, Any] = {"kind": "comparison", "prompt": PROMPT, "asked_by": "bot", "created": time.time()}
    return GenerationRecord(id=id, answers=answers, **{**known, "recorded": True, **settings})


def say(store: Store, target: str, verdict: Verdict, labeller: str = "anna", **settings: Any) -> Receipt:
    judgement = Feedback(target=target, verdict=verdict, labeller=labeller, **settings)
    return store.record_feedback(judgement).result(timeout=60)


def record(store: Store, *groups: GenerationRecord) -> None:
    for future in [store.record(group) for group in groups]:
        future.result(timeout=60)


def exported(store: Store, **settings: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.export(**settings)]


def first(number: int) -> Choice:
    return Choice(winner=f"cmp-{number}-0")


# What is learned from a judgement


@pytest.mark.parametrize(
    ("target", "verdict", "completions", "rewards", "versions"),
    [
        ("cmp-1", Choice(winner="cmp-1-1"), ["no", "yes"], [1, 0], [2, 1]),
        ("cmp-1", Choice(winner="cmp-1-0"), ["yes", "no"], [1, 0], [1, 2]),
        ("cmp-1", Choice(winner="tie"), ["yes", "no"], [0.5, 0.5], [1, 2]),
        ("cmp-1", Choice(winner="both_bad"), ["yes", "no"], [0, 0], [1, 2]),
        ("cmp-1-1", Thumb(up=True), ["no"], [1], [2]),
        ("cmp-1-0", Thumb(up=False), ["yes"], [0], [1]),
        ("one", Thumb(up=True), ["only"], [1], [1]),
        ("three", Ranking(order=("three-2", "three-0", "three-1")), ["c", "a", "b"], [1, 0.5, 0], [3, 1, 2]),
        ("one-0", Correction(text="better"), ["only", "better"], [0, 1], [1, None]),
    ],
)
def test_a_judgement_becomes_a_training_row(
    store: Store,
    target: str,
    verdict: Verdict,
    completions: list[str],
    rewards: list[float],
    versions: list[int | None],
) -> None:
    record(store, issued(), issued("one", texts=("only",), prompt="Hello?"), issued("three", texts=tuple("abc")))
    receipt = say(store, target, verdict, comment="because")
    (row,) = exported(store)
    prompt = "Hello?" if target.startswith("one") else [{"role": m.role, "content": m.content} for m in PROMPT]
    assert row == {
        "id": receipt.id,
        "prompt": prompt,
        "completions": completions,
        "rewards": rewards,
        "labeller": "anna",
        "kind": verdict.kind,
        "finish_reasons": [version and ENDS[version - 1] for version in versions],
        "versions": versions,
        "created": receipt.created,
    }
    group = to_group(row, "here", SourceConfig(path="x"))
    assert group.prompt == ("Hello?" if target.startswith("one") else PROMPT)
    assert [completion.reward for completion in group.completions] == rewards


def test_a_receipt_says_what_was_stored_and_when(store: Store) -> None:
    record(store, issued("one", texts=("only",)))
    before = time.time()
    receipt = say(store, "one", Thumb(up=True))
    assert before <= receipt.created <= time.time()
    assert receipt == Receipt(id="jdg-1", kind="thumb", target="one-0", created=receipt.created, replaces=None)


def test_an_empty_answer_is_judged_but_teaches_nothing(store: Store) -> None:
    record(store, issued(texts=("yes", " \n")))
    say(store, "cmp-1", first(1))
    assert exported(store) == []
    assert store.statistics().judged == 1


def test_a_verdict_that_does_not_fit_its_target_is_refused(store: Store) -> None:
    record(store, issued(), issued("cmp-2"), issued("one", texts=("only",)), issued("four", texts=tuple("abcd")))
    unfit: list[tuple[str, Verdict]] = [
        ("cmp-1", Choice(winner="cmp-2-0")),
        ("cmp-1", Choice(winner="TIE")),
        ("cmp-1-0", Choice(winner="cmp-1-0")),
        ("four", Choice(winner="four-0")),
        ("cmp-1", Thumb(up=True)),
        ("cmp-1-0", Ranking(order=("cmp-1-0", "cmp-1-1"))),
        ("cmp-1", Ranking(order=("cmp-1-0",))),
        ("cmp-1", Ranking(order=("cmp-1-0", "cmp-1-0"))),
        ("cmp-1", Ranking(order=("cmp-1-0", "cmp-1-1", "cmp-1-1"))),
        ("cmp-1", Ranking(order=("cmp-1-0", "four-1"))),
        ("one", Ranking(order=("one-0",))),
        ("cmp-1", Correction(text="better")),
        ("cmp-1-0", Correction(text=" \n")),
    ]
    for target, verdict in unfit:
        with pytest.raises(BadVerdict):
            say(store, target, verdict)
    assert store.statistics().by_kind == {}


def test_an_id_that_was_not_issued_is_unknown(store: Store) -> None:
    record(store, issued())
    near = ["", "-", "cmp-9", "cmp-1-2", "cmp-1-00", "cmp-1-", "cmp", "CMP-1", "cmp-1\n", "jdg-1"]
    for id in [*near, "../../etc/passwd", NASTY, "\0", "é", "cmp-1-" + "9" * 5000, "x" * 100_000]:
        with pytest.raises(UnknownId) as caught:
            say(store, id, Thumb(up=True))
        assert len(str(caught.value)) < 100
        with pytest.raises(UnknownId):
            store.delete(id).result(timeout=60)


# Once, and only the last word


def test_the_same_again_gets_the_same_receipt(store: Store) -> None:
    record(store, issued(), issued())
    receipts = {
        say(store, "cmp-1", first(1), key="k"),
        say(store, "cmp-1", first(1), key="k"),
        say(store, "cmp-1", first(1)),
        say(store, "cmp-1", first(1), key="another"),
    }
    assert len(receipts) == 1
    assert len(exported(store)) == 1


@pytest.mark.parametrize("key_came_first", [True, False])
def test_a_key_that_comes_again_with_another_content_is_refused(store: Store, key_came_first: bool) -> None:
    record(store, issued(), issued("cmp-2"))
    if not key_came_first:
        say(store, "cmp-1", first(1))
    receipt = say(store, "cmp-1", first(1), key="k")
    for target, verdict, comment in [
        ("cmp-1", Choice(winner="tie"), None),
        ("cmp-2", first(2), None),
        ("cmp-1-0", Thumb(up=True), None),
        ("cmp-1", first(1), "a comment"),
    ]:
        with pytest.raises(Conflict):
            say(store, target, verdict, key="k", comment=comment)
    assert say(store, "cmp-1", Choice(winner="tie"), "ben", key="k").id != receipt.id, "a key belongs to one labeller"
    assert [row["id"] for row in exported(store) if row["labeller"] == "anna"] == [receipt.id]


@pytest.mark.parametrize("key", ["", "a" * 201, "é", "a\nb", "\0"])
def test_an_idempotency_key_is_short_and_printable(key: str) -> None:
    with pytest.raises(BadVerdict):
        Feedback(target="cmp-1", verdict=first(1), labeller="anna", key=key)


def test_a_second_verdict_supersedes_the_first_of_the_same_labeller_kind_and_target(store: Store) -> None:
    record(store, issued())
    one = say(store, "cmp-1", first(1), key="k")
    others = [
        say(store, "cmp-1", Choice(winner="tie"), "ben"),
        say(store, "cmp-1", Ranking(order=("cmp-1-0", "cmp-1-1"))),
        say(store, "cmp-1-0", Thumb(up=True)),
        say(store, "cmp-1-1", Thumb(up=True)),
    ]
    two = say(store, "cmp-1", Choice(winner="cmp-1-1"))
    three = say(store, "cmp-1", first(1))
    assert [receipt.replaces for receipt in (one, *others, two, three)] == [None] * 5 + [one.id, two.id]
    assert [row["id"] for row in exported(store)] == [*(other.id for other in others), three.id]
    assert say(store, "cmp-1", first(1), key="k") == one, "its receipt, though it counts no longer"


def test_recording_the_same_group_again_changes_nothing(store: Store) -> None:
    record(store, issued(), issued(texts=("other", "texts")))
    say(store, "cmp-1", first(1))
    assert exported(store)[0]["completions"] == ["yes", "no"]
    assert store.statistics().answers == 2


def test_ids_of_answers_follow_from_the_groups(store: Store) -> None:
    answer = RecordedAnswer(id="cmp-1-1", text="t", version=1, model="m", finish_reason=None)
    known: dict[str, Any] = {"kind": "chat", "prompt": "p", "asked_by": "a", "created": 0.0, "recorded": True}
    for id, answers in [("cmp-1", (answer,)), ("cmp-1", ()), ("", ()), ("a b", ()), ("a\0", ()), ("x" * 201, ())]:
        with pytest.raises(ValueError):
            GenerationRecord(id=id, answers=answers, **known)


# What is kept


def everything_in(database: str) -> str:
    """All that a database holds, in the file's bytes or in the server's rows."""
    if database.startswith("sqlite"):
        path = Path(database.removeprefix("sqlite:///"))
        return "".join(file.read_bytes().decode("latin-1") for file in path.parent.glob(path.name + "*"))
    with connection_to(database) as connection:
        names = [*metadata.tables]
        return "".join(str(connection.execute(f'SELECT * FROM "{name}"').fetchall()) for name in names)  # type: ignore[call-overload]


def test_without_recording_no_text_reaches_the_database(store: Store, database: str) -> None:
    texts = ("SECRET answer", "SECRET other")
    record(store, issued(texts=texts, recorded=False, prompt="SECRET prompt"))
    record(store, issued("one", texts=texts[:1], recorded=False))
    receipt = say(store, "cmp-1", first(1), comment="SECRET comment")
    say(store, "one", Thumb(up=True))
    with pytest.raises(BadVerdict, match="record"):
        say(store, "one", Correction(text="SECRET correction"))
    assert exported(store) == []
    counted = store.statistics()
    assert (counted.answers, counted.judged, counted.by_kind) == (3, 1, {"choice": 1, "thumb": 1})
    assert counted.wins_by_version[1].wins == 1
    assert say(store, "cmp-1", first(1), comment="SECRET other comment") == receipt
    assert "cmp-1" in everything_in(database)
    assert "SECRET" not in everything_in(database)


def test_any_text_is_kept_as_it_is(store: Store) -> None:
    texts = (NASTY + "0", NASTY + "1")
    record(
        store,
        issued(texts=texts, prompt=(Message(role="user", content=NASTY),)),
        issued("p", texts=("a",), prompt=NASTY),
    )
    say(store, "cmp-1", first(1), comment=NASTY)
    say(store, "p", Correction(text=NASTY))
    lines = list(store.export())
    assert [line.splitlines(keepends=True) for line in lines] == [[line] for line in lines], "one line each"
    one, two = map(json.loads, lines)
    assert (one["prompt"], one["completions"]) == ([{"role": "user", "content": NASTY}], [*texts])
    assert (two["prompt"], two["completions"]) == (NASTY, ["a", NASTY])


@pytest.mark.parametrize(
    "id", ["../../../tmp/x", "/etc/passwd", "<script>alert(1)</script>", "'; DROP TABLE groups; --x"[:25]]
)
def test_an_id_that_looks_like_something_else_is_only_an_id(store: Store, tmp_path: Path, id: str) -> None:
    id = id.replace(" ", "_")
    files = sorted(tmp_path.rglob("*"))
    record(store, issued(id))
    assert say(store, id, Choice(winner=f"{id}-1")).target == id
    assert exported(store)[0]["completions"] == ["no", "yes"]
    assert store.delete(id).result(timeout=60) == 4
    assert sorted(tmp_path.rglob("*")) == files


def test_deleting_a_group_deletes_all_that_belongs_to_it(store: Store, database: str) -> None:
    record(store, issued(texts=("FORGET", "ME")), issued("cmp-2"))
    say(store, "cmp-1", first(1), key="a")
    say(store, "cmp-1", Choice(winner="tie"), key="b")
    kept = say(store, "cmp-2", first(2), key="c")
    assert store.delete("cmp-1").result(timeout=60) == 1 + 2 + 2
    with pytest.raises(UnknownId):
        store.delete("cmp-1").result(timeout=60)
    with pytest.raises(UnknownId):
        say(store, "cmp-1", first(1))
    assert [row["id"] for row in exported(store)] == [kept.id]
    store.close()
    assert "FORGET" not in everything_in(database)


def test_a_deleted_judgement_is_gone_and_does_not_bring_back_what_it_replaced(store: Store) -> None:
    record(store, issued())
    one = say(store, "cmp-1", first(1), key="a")
    two = say(store, "cmp-1", Choice(winner="tie"), key="b")
    assert store.delete(two.id).result(timeout=60) == 1
    assert exported(store) == []
    assert store.statistics().by_kind == {}
    again = say(store, "cmp-1", Choice(winner="tie"), key="b")
    assert again.id not in (one.id, two.id), "no number is used twice"
    assert [row["id"] for row in exported(store, after_id=two.id)] == [again.id], "a deleted id is still a place"


def test_what_is_too_old_is_forgotten_at_once_and_every_hour(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, now = Store(database), time.time()
    record(store, *(issued(f"cmp-{number}", created=now - number * 86_400) for number in range(500)))
    say(store, "cmp-2", first(2), key="k")
    say(store, "cmp-400", first(400), key="k2")
    store.close()
    monkeypatch.setattr(writing, "CHORE_EVERY_S", 0.2)
    store = Store(database, retention_days=2.5)
    for _ in range(2):
        deadline = time.monotonic() + 60
        while store.statistics().comparisons != 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(exported(store)) == 1
        with pytest.raises(UnknownId):
            say(store, "cmp-3", first(3))
        record(store, issued("cmp-3", created=now - 3 * 86_400))
    store.close()


# Reading


def test_an_export_has_a_stable_order_and_can_go_on_where_it_ended(store: Store) -> None:
    record(store, *(issued(f"cmp-{number}") for number in range(250)))
    receipts = [say(store, f"cmp-{number}", first(number)) for number in reversed(range(250))]
    ids = [receipt.id for receipt in receipts]
    assert [row["id"] for row in exported(store)] == ids
    assert [row["id"] for row in exported(store, after_id=ids[6], limit=120)] == ids[7:127]
    assert (
        exported(store, limit=0)
        == exported(store, after_id=ids[-1])
        == exported(store, after_id="jdg-" + "9" * 18)
        == []
    )
    for wrong in ("cmp-1", "jdg-", "jdg--1", "jdg-1x", "", "jdg-" + "9" * 30, "jdg-١"):
        with pytest.raises(UnknownId):
            store.export(after_id=wrong)


def test_an_export_shows_one_moment_whatever_is_said_meanwhile(store: Store) -> None:
    record(store, *(issued(f"cmp-{number}") for number in range(250)))
    ids = [say(store, f"cmp-{number}", first(number)).id for number in range(250)]
    lines = store.export()
    begun = [next(lines)]
    for number in (0, 100, 249):
        say(store, f"cmp-{number}", Choice(winner="tie"))
    assert [json.loads(line)["id"] for line in [*begun, *lines]] == ids


def test_statistics_as_worked_out_by_hand(store: Store) -> None:
    record(
        store,
        *(
            issued(f"cmp-{number}", versions=versions)
            for number, versions in enumerate([(3, 4), (4, 3), (4, 4), (3, 4)])
        ),
    )
    record(store, issued("chat", texts=("one",), kind="chat"))
    for number, name, winner in [
        (0, "anna", "cmp-0-0"),  # 3 wins
        (0, "ben", "cmp-0-0"),  # 3 wins, agrees
        (0, "cleo", "cmp-0-1"),  # 4 wins, disagrees with both
        (1, "anna", "tie"),
        (1, "ben", "both_bad"),  # a tie for the versions, but another verdict
        (2, "anna", "cmp-2-0"),  # both are version 4
        (1, "cleo", "cmp-1-0"),
        (1, "cleo", "cmp-1-1"),  # supersedes: 3 wins
    ]:
        say(store, f"cmp-{number}", Choice(winner=winner), name)
    say(store, "chat", Thumb(up=True), "ben")
    counted = store.statistics()
    assert (counted.answers, counted.comparisons, counted.judged) == (9, 4, 3)
    assert counted.by_kind == {"choice": 7, "thumb": 1}
    assert counted.by_labeller == {"anna": 3, "ben": 3, "cleo": 2}
    assert counted.agreement == Agreement(pairs=6, agreed=1, rate=1 / 6)
    assert counted.wins_by_version == {3: Wins(wins=3, losses=1, ties=2), 4: Wins(wins=1, losses=3, ties=2)}


def test_one_model_is_exported_and_counted_alone(store: Store) -> None:
    groups = [issued(f"cmp-{number}", versions=(1, 2)) for number in range(3)]
    for group, model in zip(groups, ("a", "b", "b"), strict=True):
        answers = tuple(replace(answer, model=model) for answer in group.answers)
        record(store, replace(group, answers=answers))
        say(store, group.id, Choice(winner=f"{group.id}-{int(model == 'b')}"))
    assert [row["id"] for row in exported(store, model="b")] == ["jdg-2", "jdg-3"]
    assert [row["id"] for row in exported(store, model="b", after_id="jdg-2", limit=5)] == ["jdg-3"]
    assert exported(store, model="c") == []
    assert [row["model"] for row in exported(store, names_model=True)] == ["a", "b", "b"]
    assert all("model" not in row for row in exported(store)), "as before, where there is one model"
    counted = {model: store.statistics(model=model) for model in ("a", "b", "c", None)}
    assert [entry.answers for entry in counted.values()] == [2, 4, 0, 6]
    assert [entry.judged for entry in counted.values()] == [1, 2, 0, 3]
    assert [entry.by_kind for entry in counted.values()] == [{"choice": 1}, {"choice": 2}, {}, {"choice": 3}]
    assert [entry.by_labeller.get("anna", 0) for entry in counted.values()] == [1, 2, 0, 3]
    assert counted["a"].wins_by_version == {1: Wins(wins=1, losses=0, ties=0), 2: Wins(wins=0, losses=1, ties=0)}
    assert counted["b"].wins_by_version == {1: Wins(wins=0, losses=2, ties=0), 2: Wins(wins=2, losses=0, ties=0)}


def test_statistics_of_nothing(store: Store) -> None:
    counted = store.statistics()
    assert counted.agreement == Agreement(pairs=0, agreed=0, rate=None)
    assert (counted.answers, counted.by_kind, counted.wins_by_version) == (0, {}, {})


# Opening


def test_the_migrations_make_the_tables_that_the_code_expects(database: str) -> None:
    engine = opened_engine(database)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_processes_that_open_a_new_database_at_once_all_find_it_whole(database: str) -> None:
    code = (
        "import sys, time; from serving.feedback.store import Store; print('ready', flush=True); sys.stdin.readline()\n"
        "store = Store(sys.argv[1]); print(store.statistics().answers); store.close()"
    )
    command = [sys.executable, "-c", code, database]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    told = []
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        told.append(process.communicate(timeout=60)[0])
        assert process.returncode == 0
    assert told == ["0\n"] * 4


def test_a_migration_that_fails_half_way_leaves_nothing_behind(database: str) -> None:
    engine = opened_engine(database)
    metadata.drop_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE alembic_version"))
        connection.execute(sa.text("CREATE TABLE keys (name TEXT)"))  # the last one that the migration makes
    with pytest.raises(StoreAway, match="keys"):
        Store(database)
    assert sa.inspect(engine).get_table_names() == ["keys"]
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE keys"))
    engine.dispose()
    Store(database).close()


def test_a_database_of_a_newer_raylign_is_refused(database: str) -> None:
    Store(database).close()
    engine = opened_engine(database)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(ServingError, match="newer raylign"):
        Store(database)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "feedback.sqlite",
        "sqlite://",
        "mysql://u:hunter2@h/d",
        "mysql://h/d?password=hunter2",
        "postgresql+psycopg://u:hunter2@h",
        "://hunter2",
    ],
)
def test_a_url_of_no_usable_database_is_refused_and_its_password_not_quoted(url: str) -> None:
    with pytest.raises(ServingError, match="sqlite:///FILE or postgresql") as caught:
        Store(url)
    assert "hunter2" not in str(caught.value)


def test_a_database_that_does_not_answer_is_away(tmp_path: Path) -> None:
    with pytest.raises(StoreAway) as caught:
        Store("postgresql://u:hunter2@127.0.0.1:1/d?sslpassword=hunter2")
    assert "127.0.0.1:1/d?sslpassword=*** cannot be opened" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    (tmp_path / "no.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreAway, match="not a database"):
        Store(f"sqlite:///{tmp_path / 'no.sqlite'}")
    (tmp_path / "file").touch()
    with pytest.raises(ServingError, match=r"Not a directory|File exists"):
        Store(f"sqlite:///{tmp_path / 'file' / 'x.sqlite'}")


def test_a_store_that_may_be_away_opens_when_the_database_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "REOPEN_S", 0.05)
    path = tmp_path / "feedback.sqlite"
    path.mkdir()  # root may read any file, and no folder is a database
    store = Store(f"sqlite:///{path}", may_be_away=True)
    for asked in (store.keys, store.statistics, lambda: record(store, issued())):
        with pytest.raises(StoreAway, match="unable to open"):
            asked()
    path.rmdir()
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(StoreAway):
            record(store, issued())
            break
        assert time.monotonic() < deadline
    assert store.statistics().answers == 2
    store.close()


def test_a_store_that_stays_away_closes(tmp_path: Path) -> None:
    store = Store("postgresql://u@127.0.0.1:1/d", may_be_away=True)
    store.close()
    with pytest.raises(StoreAway):
        record(store, issued())


def test_a_sqlite_file_is_private_and_durable(tmp_path: Path) -> None:
    path = tmp_path / "new" / "feedback.sqlite"
    store = Store(f"sqlite:///{path}")
    record(store, issued())
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
    store.close()
    engine = opened_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        pragmas = ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
        assert [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas] == ["wal", 2, 1, 1]
    engine.dispose()


# Writing, when all goes wrong


def test_an_item_that_the_database_refuses_fails_alone(store: Store, database: str) -> None:
    """Nothing of what comes in through HTTP is refused, so this takes a version that is no 64-bit number."""
    with held(database):
        futures = [
            store.record(issued("cmp-1")),
            store.record(issued("cmp-2", versions=(1, 2**70))),
            store.record(issued("cmp-3")),
        ]
        judged = [
            store.record_feedback(Feedback(target=f"cmp-{n}", verdict=first(n), labeller="anna")) for n in (1, 2, 3)
        ]
    for future in (futures[0], futures[2], judged[0], judged[2]):
        future.result(timeout=60)
    with pytest.raises(StoreError, match="refuses"):
        futures[1].result(timeout=60)
    with pytest.raises(UnknownId):
        judged[1].result(timeout=60)
    assert len(exported(store)) == 2


@contextmanager
def held(database: str) -> Iterator[None]:
    """Another process writes and does not finish, so that everything waits."""
    engine = opened_engine(database)
    with engine.connect().execution_options(**WRITES) as connection, connection.begin():
        lock(connection)
        yield
    engine.dispose()


def test_too_much_that_waits_is_refused_at_once(store: Store, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MAX_WAITING", 20_000)
    with held(database):
        futures = [store.record(issued(f"cmp-{number}", texts=("a" * 2000, "b" * 1000))) for number in range(8)]
        assert all(isinstance(future.exception(timeout=0), StoreAway) for future in futures[4:])
    record(store, issued("cmp-8"))
    for future in futures[:4]:
        future.result(timeout=60)
    assert store.statistics().comparisons == 5


def test_a_caller_that_goes_away_cancels_nothing(store: Store, database: str) -> None:
    with held(database):
        future = store.record(issued())
        assert not future.cancel()
    future.result(timeout=60)


def test_closing_writes_what_waits_and_then_nothing(database: str) -> None:
    store = Store(database)
    futures = [store.record(issued(f"cmp-{number}")) for number in range(300)]
    store.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(StoreAway, match="closed"):
        store.record(issued("late")).result(timeout=60)
    store.close()
    again = Store(database)
    assert again.statistics().comparisons == 300
    again.close()


def fill(store: Store) -> None:
    """Records until the disk is full; what was acknowledged is there."""
    acknowledged = 0
    with pytest.raises(StoreFull, match="full"):
        for number in range(10_000):
            record(store, issued(f"cmp-{number}", texts=("long " * 2000, "no")))
            acknowledged += 1
    assert acknowledged > 2
    assert store.statistics().comparisons == acknowledged


def test_a_full_sqlite_database_acknowledges_nothing(sqlite_url: str) -> None:
    def limit(connection: sqlite3.Connection, _: Any) -> None:
        connection.execute("PRAGMA max_page_count=60")

    sa.event.listen(sa.pool.Pool, "connect", limit)
    try:
        store = Store(sqlite_url)
        fill(store)
        store.close()
    finally:
        sa.event.remove(sa.pool.Pool, "connect", limit)
    store = Store(sqlite_url)
    record(store, issued("more"))
    store.close()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
def test_a_full_disk_acknowledges_nothing_and_loses_nothing(tiny_disk: Path) -> None:
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(2**20))
    store = Store(f"sqlite:///{tiny_disk / 'feedback.sqlite'}")
    fill(store)
    kept = store.statistics().comparisons
    ballast.unlink()
    record(store, issued("more"))
    assert store.statistics().comparisons == kept + 1
    store.close()


def test_a_postgresql_server_without_space_acknowledges_nothing(postgresql: str) -> None:
    database = new_schema(postgresql)
    store = Store(database)
    record(store, issued())
    with connection_to(database) as connection:
        connection.execute(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$"
        )
        connection.execute("CREATE TRIGGER full_disk BEFORE INSERT ON judgements EXECUTE FUNCTION full_disk()")
        with pytest.raises(StoreFull):
            say(store, "cmp-1", first(1))
        connection.execute("DROP TRIGGER full_disk ON judgements")
    say(store, "cmp-1", first(1))
    store.close()


def test_a_postgresql_server_that_hangs_up_is_called_again(postgresql: str) -> None:
    database = new_schema(postgresql)
    store = Store(database)
    record(store, issued())
    say(store, "cmp-1", first(1))
    hang_up = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = %s"
    with connection_to(database) as connection:
        connection.execute(hang_up, ["Client"])  # those that wait for the next statement
        assert say(store, "cmp-1", Choice(winner="tie")).id == "jdg-2"
        with held(database):
            future = store.record_feedback(Feedback(target="cmp-1", verdict=first(1), labeller="anna"))
            while connection.execute(hang_up, ["Lock"]).rowcount == 0:
                time.sleep(0.01)
            with pytest.raises(StoreAway):
                future.result(timeout=60)
    assert [row["rewards"] for row in exported(store)] == [[0.5, 0.5]]
    assert say(store, "cmp-1", first(1)).replaces == "jdg-2"
    store.close()


# Many writers


def acknowledged_by(database: str, *, kill_after: int | None = None) -> list[tuple[str, str]]:
    """What a process of 64 writers says was acknowledged: (labeller and item, id); it is killed after so many."""
    command = [sys.executable, "-m", "tests.serving.feedback_writer", database]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if len(lines) == kill_after:
            process.kill()
    assert process.wait(timeout=60) == (0 if kill_after is None else -signal.SIGKILL)
    whole = (line.rsplit(maxsplit=1) for line in lines if line.endswith("\n"))
    return [(what, id) for what, id in whole]


def test_what_64_writers_were_promised_is_there_once_though_their_process_is_killed(database: str) -> None:
    store = Store(database)
    record(store, *(issued(f"cmp-{number}") for number in range(ITEMS)))
    store.close()
    promised: dict[str, str] = {}
    for kill_after in (600, None):
        acknowledged = acknowledged_by(database, kill_after=kill_after)
        assert len(acknowledged) >= (kill_after or WRITERS * ITEMS)
        for what, id in acknowledged:
            assert promised.setdefault(what, id) == id, "asked again, it is the same receipt"
        store = Store(database)
        rows = exported(store)
        store.close()
        labels = [(row["labeller"], row["id"]) for row in rows]
        assert len(set(labels)) == len(rows)
        assert {(f"writer{what.split()[0]}", id) for what, id in promised.items()} <= set(labels)
    assert len(rows) == len(promised) == WRITERS * ITEMS
    for row in rows:
        assert row["rewards"] == [1, 0]


def test_recording_costs_the_caller_next_to_nothing_while_others_write(store: Store) -> None:
    record(store, *(issued(f"cmp-{number}") for number in range(100)))
    done = threading.Event()

    def keep_writing(name: str) -> None:
        for number in itertools.count():
            if done.is_set():
                return
            say(store, f"cmp-{number % 100}", Choice(winner=("tie", "both_bad")[number // 100 % 2]), name)

    writers = [threading.Thread(target=keep_writing, args=(f"writer{number}",)) for number in range(8)]
    for writer in writers:
        writer.start()
    seconds, until_written = [], []
    for number in range(150):
        group = issued(f"chat-{number}", kind="chat", prompt="word " * 500, texts=("word " * 500,))
        started = time.perf_counter()
        future = store.record(group)
        seconds.append(time.perf_counter() - started)
        future.result(timeout=60)
        until_written.append(time.perf_counter() - started)
    done.set()
    for writer in writers:
        writer.join()
    assert statistics.median(seconds) < 0.2 * statistics.median(until_written), statistics.quantiles(seconds, n=20)
