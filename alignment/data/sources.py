"""Reads rows from files, the hub, endpoints and databases. Every row has an origin; a broken row is an error object."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.data.files import KINDS, Rows, is_data_file, parse_line, read_file
from alignment.data.splits import data_files, may_hold_split
from alignment.errors import DataError
from alignment.settings.data import SourceConfig, is_function_name
from alignment.settings.plugins import load_function

if TYPE_CHECKING:
    import httpx
    import sqlalchemy as sa

ENDPOINTS = ("http://", "https://")
DATABASES = ("sqlite:///", "postgresql://", "postgresql+psycopg://")
KEY_VARIABLE = "RAYLIGN_KEY"
"""Environment variable with the bearer key for endpoints."""
PAGE = 1000
"""Number of rows in one request to an endpoint, or one query to a database."""
TIMEOUT_S = 60.0
"""Seconds after which an endpoint that sends nothing has failed."""


@dataclass(frozen=True, kw_only=True)
class SourceKind:
    """A kind of `data.path`, by what the path looks like."""

    matches: Callable[[str], bool]
    """Whether a path is of this kind."""
    read: Callable[[str, SourceConfig], Rows]
    """Yields the rows at a path of this kind, each with its origin.

    Raises:
        DataError: the source cannot be opened.
    """
    is_live: bool = False
    """True if such a source may have different rows each time it is read."""


def is_live(source: SourceConfig) -> bool:
    """True if the source may have different rows each time it is read: an endpoint or a database."""
    path = source.path
    return path is not None and any(kind.is_live and kind.matches(path) for kind in SOURCES.values())


def read_rows(source: SourceConfig) -> Rows:
    """Yields (`file:line`, row) for every row between `skip` and `take`; a broken row is yielded as its DataError.

    A row of an endpoint has the id of its feedback in place of the line.

    Raises:
        DataError: the source itself cannot be opened.
        ConfigError: the path is a dotted name, and there is no such function.
    """
    assert source.path is not None
    kind = next(kind for kind in SOURCES.values() if kind.matches(source.path))
    rows = kind.read(source.path, source)
    return islice(rows, source.skip, None if source.take is None else source.skip + source.take)


def _local_path(path: str) -> Path:
    return Path(path).expanduser()


def _refuse_missing_file(path: str, _: SourceConfig) -> Rows:
    raise DataError(f"data file {path} does not exist (looked from {Path.cwd()})")


def _read_by_function(name: str, source: SourceConfig) -> Rows:
    """Yields the rows of the iterable that a function of one's own returns.

    Raises:
        ConfigError: there is no such function.
        DataError: the function raises an error, or what it yields is no row.
    """
    function, number = load_function(name, "source"), 0
    try:
        for number, row in enumerate(function(source), start=1):
            is_row = isinstance(row, dict)
            yield f"{name}:{number}", row if is_row else DataError(f"is no row but a {type(row).__name__}")
    except DataError:
        raise
    except Exception as error:  # anything may come from a function of one's own
        raise DataError(f"{name}: raises {error!r:.200} after row {number}") from error


def _read_path(path: str, source: SourceConfig) -> Rows:
    return _read_files(_local_path(path), source)


def _read_files(path: Path, source: SourceConfig) -> Rows:
    if path.is_file():
        if not is_data_file(path):
            raise DataError(f"{path}: unknown kind of file; known are {KINDS}")
        # data.name and data.data_dir are not used: a recipe for the hub has them, and only its data.path is overridden.
        if not may_hold_split(path, source.split):
            raise DataError(
                f"{path}: is one file, whose name says nothing of the split {source.split!r}; leave split out, or give "
                "the folder"
            )
        return read_file(path, source.split)
    folder = path / (source.data_dir or "")
    if not folder.is_dir():
        raise DataError(f"{path}: has no folder {source.data_dir!r} (data_dir)")
    return chain.from_iterable(map(read_file, data_files(folder, source.split, source.name)))


def _read_pattern(pattern: str, source: SourceConfig) -> Rows:
    """Reads all files that match a shell pattern, as `data/train-*.parquet`."""
    pattern = str(_local_path(pattern))
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
    files = [path for path in paths if is_data_file(path) and path.is_file()]
    if not files:
        raise DataError(f"{pattern}: matches no file of a known kind ({KINDS}; looked from {Path.cwd()})")
    return chain.from_iterable(_read_files(file, source) for file in files)


def _read_hub(path: str, source: SourceConfig) -> Rows:
    import datasets

    try:
        rows = datasets.load_dataset(
            path, name=source.name, data_dir=source.data_dir, split=source.split, streaming=source.streaming
        )
    except Exception as error:  # `datasets` raises some twenty unrelated kinds; each means that it cannot be loaded
        raise DataError(
            f"{path}: is neither a local file nor a dataset that can be loaded from the hub: {error}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", row


def _read_endpoint(url: str, _: SourceConfig) -> Rows:
    """Reads the feedback of an endpoint, page by page."""
    import httpx

    from alignment.rewards.remote import key_from

    try:
        page_url = httpx.URL(url).copy_merge_params({"limit": PAGE})
    except httpx.InvalidURL as error:
        raise DataError(f"{url}: is no URL: {error}") from error
    endpoint = str(page_url.copy_with(query=None))
    if not page_url.path.endswith("/feedback/export"):
        raise DataError(f"{endpoint}: over HTTP, only an endpoint's …/v1/feedback/export is read; download other data")
    headers = {"Authorization": f"Bearer {key_from(KEY_VARIABLE)}"} if KEY_VARIABLE in os.environ else {}
    with httpx.Client(headers=headers, timeout=TIMEOUT_S) as client:
        while rows := [parse_line(line) for line in _fetch_page(client, page_url, endpoint)]:
            last_id = None
            for row in rows:
                last_id = row.get("id") if isinstance(row, dict) else None
                yield f"{endpoint}:{last_id}", row
            if not isinstance(last_id, str) or last_id == page_url.params.get("since"):
                raise DataError(f"{endpoint}: is no export of feedback: its last row has no new id")
            page_url = page_url.copy_merge_params({"since": last_id})


def _fetch_page(client: httpx.Client, url: httpx.URL, endpoint: str) -> list[bytes]:
    import httpx

    try:
        response = client.get(url)
    except httpx.HTTPError as error:
        raise DataError(f"{endpoint}: cannot be read: {error or type(error).__name__}") from error
    if response.status_code in (401, 403):
        raise DataError(f"{endpoint}: is for administrators, and ${KEY_VARIABLE} does not hold the key of one")
    if response.status_code != 200:
        raise DataError(f"{endpoint}: answers with HTTP status {response.status_code}")
    return response.content.splitlines()


def _read_database(url: str, _: SourceConfig) -> Rows:
    """Reads the feedback of an endpoint from its database: the entries that are not superseded, in order of number."""
    import sqlalchemy as sa

    database_url = sa.make_url(url)
    if database_url.drivername == "sqlite":
        file = Path(database_url.database or "").expanduser()
        if not file.is_file():
            raise DataError(f"data file {file} does not exist (looked from {Path.cwd()})")
        database_url = database_url.set(database=str(file))
    number, row = sa.column("number", sa.BigInteger), sa.column("row", sa.Text)
    query = sa.select(number, row).select_from(sa.table("judgements")).order_by(number).limit(PAGE)
    query = query.where(row.is_not(None), sa.column("superseded_by").is_(None), number > sa.bindparam("last"))
    engine, last_number = sa.create_engine(database_url), 0
    try:
        while records := _fetch_records(engine, query, last_number):
            last_number = records[-1].number
            for record in records:
                yield f"{database_url.render_as_string()}:jdg-{record.number}", parse_line(record.row.encode())
    finally:
        engine.dispose()


def _fetch_records(engine: sa.Engine, query: sa.Select[int, str], last_number: int) -> Sequence[sa.Row[int, str]]:
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with engine.connect() as connection:
            return connection.execute(query, {"last": last_number}).all()
    except SQLAlchemyError as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{engine.url.render_as_string()}: cannot be read: {reason}") from error


SOURCES = {
    "endpoint": SourceKind(matches=lambda path: path.startswith(ENDPOINTS), read=_read_endpoint, is_live=True),
    "database": SourceKind(matches=lambda path: path.startswith(DATABASES), read=_read_database, is_live=True),
    "files": SourceKind(matches=lambda path: _local_path(path).exists(), read=_read_path),
    "pattern": SourceKind(matches=lambda path: any(sign in path for sign in "*?["), read=_read_pattern),
    "missing_file": SourceKind(
        matches=lambda path: path.startswith((".", "/", "~")) or is_data_file(path), read=_refuse_missing_file
    ),
    "function": SourceKind(matches=is_function_name, read=_read_by_function),
    "hub": SourceKind(matches=lambda path: True, read=_read_hub),
}
"""The kinds of sources, by name. A path is of the first kind that it matches."""
