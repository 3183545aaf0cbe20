"""What people said to an endpoint is data like any other: over HTTP, or from the endpoint's database."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest

from alignment.data import sources
from alignment.data.files import Row
from alignment.data.sources import read_rows
from alignment.errors import ConfigError, DataError
from alignment.settings.data import SourceConfig
from alignment.settings.load import check_config
from alignment.settings.run import RunConfig
from serving.feedback.store import Store
from serving.feedback.store.records import Choice, Feedback, GenerationRecord, RecordedAnswer, UnknownId
from tests.conftest import free_port

KEY = "rk_0123456789abcdef_" + "s" * 43


def read(path: str, **settings: Any) -> list[tuple[str, Row | DataError]]:
    return list(read_rows(SourceConfig(path=path, **settings)))


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    """Seven judgements of five comparisons, of which jdg-1 is superseded and jdg-2 is without text."""
    opened = Store(database)
    answers = [
        tuple(
            RecordedAnswer(id=f"cmp-{n}-{k}", text=t, version=1, model="m", finish_reason="stop")
            for k, t in ((0, "yes"), (1, "é\0"))
        )
        for n in range(6)
    ]
    for number, both in enumerate(answers):
        opened.record(
            GenerationRecord(
                id=f"cmp-{number}", kind="comparison", prompt=f"q{number}", answers=both, asked_by="a",
                created=time.time(), recorded=number != 1,
            )
        )  # fmt: skip
    for number in (0, 1, 2, 3, 4, 5):
        say(opened, number, "0")
    say(opened, 0, "1")
    yield opened
    opened.close()


def say(store: Store, number: int, winner: str) -> None:
    choice = Choice(winner=f"cmp-{number}-{winner}")
    store.record_feedback(Feedback(target=f"cmp-{number}", verdict=choice, labeller="anna")).result(timeout=60)


EXPECTED = [("jdg-3", "q2"), ("jdg-4", "q3"), ("jdg-5", "q4"), ("jdg-6", "q5"), ("jdg-7", "q0")]


def seen(rows: list[tuple[str, Row | DataError]], where: str) -> list[tuple[str, str]]:
    """(id, prompt) of every row, whose origin must be `where:id`."""
    found = []
    for origin, row in rows:
        assert isinstance(row, dict)
        place, _, id = origin.rpartition(":")
        assert place == where
        found.append((id, row["prompt"]))
    return found


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/feedback/export"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def endpoint(store: Store, most: int = 1000) -> type[BaseHTTPRequestHandler]:
    """The export route, which gives `most` rows at once at most."""

    class Export(BaseHTTPRequestHandler):
        asked: ClassVar[list[str]] = []

        def do_GET(self) -> None:
            self.asked.append(self.path)
            query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            if self.headers.get_all("Authorization") != [f"Bearer {KEY}"]:
                return self.send_error(401)
            try:
                lines = store.export(after_id=query.get("since"), limit=min(most, int(query["limit"])))
            except UnknownId:
                return self.send_error(404)
            self.send_response(200)
            self.end_headers()
            for line in lines:
                self.wfile.write(line.encode())

        def log_message(self, *_: Any) -> None:
            """Keeps quiet."""

    return Export


def test_an_endpoint_is_read_page_by_page(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLIGN_KEY", KEY)
    for most in (1, 5, 1000):
        handler = endpoint(store, most)
        with served(handler) as url:
            assert seen(read(url), url) == EXPECTED
            assert len(handler.asked) == -(-len(EXPECTED) // most) + 1  # type: ignore[attr-defined]
            assert seen(read(url, skip=1, take=2), url) == EXPECTED[1:3]
            assert seen(read(f"{url}?since=jdg-5"), url) == EXPECTED[3:]


def test_a_row_is_what_was_stored(store: Store, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLIGN_KEY", KEY)
    with served(endpoint(store)) as url:
        over_http = [row for _, row in read(url)]
    from_database = [row for _, row in read(database)]
    assert over_http == [{"id": id, **row} for (id, _), row in zip(EXPECTED, from_database, strict=True)]  # type: ignore[dict-item]
    assert over_http[-1]["completions"] == ["é\0", "yes"]  # type: ignore[index]


@pytest.mark.parametrize("page", [2, 5])
def test_a_database_is_read_page_by_page(
    store: Store, database: str, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PAGE", page)
    assert seen(read(database), database) == EXPECTED
    assert seen(read(database, skip=2), database) == EXPECTED[2:]


def test_a_key_that_the_endpoint_refuses_is_told_and_not_quoted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(endpoint(store)) as url:
        for key in (None, "wrong"):
            monkeypatch.setenv("RAYLIGN_KEY", key) if key else monkeypatch.delenv("RAYLIGN_KEY", raising=False)
            with pytest.raises(DataError) as caught:
                read(url)
            assert str(caught.value) == f"{url}: is for administrators, and $RAYLIGN_KEY does not hold the key of one"


def test_a_key_that_no_header_can_hold_is_refused_and_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLIGN_KEY", "se\ncret")
    with pytest.raises(ConfigError, match="RAYLIGN_KEY must hold a key") as caught:
        read("http://127.0.0.1:1/v1/feedback/export")
    assert "cret" not in str(caught.value)


def answering(body: bytes, *, status: int = 200, length: int | None = None) -> type[BaseHTTPRequestHandler]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Keeps quiet."""

    return Answer


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (answering(b"PRIVATE", status=500), "answers with HTTP status 500"),
        (answering(b"PRIVATE", status=404), "answers with HTTP status 404"),
        (answering(b"PRIVATE", status=302), "answers with HTTP status 302"),
        (answering(b'{"id": "jdg-1"}\n', length=100), "cannot be read: peer closed connection"),
        (answering(b'{"id": "jdg-1"}\n'), "is no export of feedback: its last row has no new id"),
        (answering(b"<html>PRIVATE</html>"), "is no export of feedback: its last row has no new id"),
        (answering(b'{"prompt": "PRIVATE"}\n'), "is no export of feedback: its last row has no new id"),
    ],
)
def test_what_is_no_export_is_an_error_in_words(handler: type[BaseHTTPRequestHandler], expected: str) -> None:
    with served(handler) as url, pytest.raises(DataError) as caught:
        read(url)
    assert str(caught.value).startswith(f"{url}: {expected}")
    assert "PRIVATE" not in str(caught.value)


def test_a_broken_line_of_an_export_stands_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {None: b'{"id": "jdg-1"}\n{"id":\n{"id": "jdg-3"}\n', "jdg-3": b""}

    class Export(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(pages[parse_qs(urlsplit(self.path).query).get("since", [None])[0]])

        def log_message(self, *_: Any) -> None:
            """Keeps quiet."""

    with served(Export) as url:
        one, (_, error), three = read(url)
    assert (one, three) == ((f"{url}:jdg-1", {"id": "jdg-1"}), (f"{url}:jdg-3", {"id": "jdg-3"}))
    assert isinstance(error, DataError) and str(error).startswith("is not valid JSON")


def test_an_endpoint_that_is_not_there_is_an_error_in_words() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1/feedback/export"
    with pytest.raises(DataError, match=r"cannot be read: .*refused"):
        read(url)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/pairs.jsonl", "https://example.org/v1/feedback", "http://h:x/v1/feedback/export"]
)
def test_other_urls_are_not_asked(url: str) -> None:
    with pytest.raises(DataError, match=r"only an endpoint's|is no URL"):
        read(url)


def test_a_database_that_is_not_one_is_an_error_in_words(tmp_path: Path, postgresql: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(f"sqlite:///{tmp_path / 'none.sqlite'}")
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty.sqlite").touch()
    (tmp_path / "other.sqlite").write_bytes(b"not a database" * 1000)
    for url, expected in [
        (f"sqlite:///{tmp_path / 'empty.sqlite'}", "no such table: judgements"),
        (f"sqlite:///{tmp_path / 'other.sqlite'}", "file is not a database"),
        (f"{postgresql}/postgres", 'relation "judgements" does not exist'),
        (f"{postgresql}/nowhere", "does not exist"),
    ]:
        with pytest.raises(DataError, match="cannot be read: ") as caught:
            read(url)
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "postgresql+psycopg://u:hunter2@h/d",
        "https://u:hunter2@h/v1/feedback/export",
        "postgresql://h/d?user=u&password=hunter2",
    ],
)
def test_a_password_is_neither_kept_with_a_run_nor_told(path: str) -> None:
    with pytest.raises(ConfigError, match="path: must hold no password") as raised:
        check_config({"path": path}, kind=SourceConfig)
    assert "hunter2" not in str(raised.value) and "***" in str(raised.value)
    with pytest.raises(ConfigError, match="steps") as raised:  # nor where another key got it
        check_config({"steps": path}, kind=RunConfig)
    assert "hunter2" not in str(raised.value)
