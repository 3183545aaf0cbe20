"""Rows from files, hubs and endpoints: every row has its origin, and a broken one is an error in its place."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from alignment.config import SourceConfig
from alignment.errors import DataError

if TYPE_CHECKING:
    import httpx
    import sqlalchemy as sa

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
ENDPOINTS = ("http://", "https://")
DATABASES = ("sqlite:///", "postgresql://", "postgresql+psycopg://")
KEY_VARIABLE = "RAYLIGN_KEY"
"""Environment variable with the bearer key for endpoints."""
PAGE = 1000
"""Rows that an endpoint is asked for at once."""
TIMEOUT_S = 60.0
"""Longest silence of an endpoint."""

Row = dict[str, Any]


def is_live(source: SourceConfig) -> bool:
    """True if a source may have other rows each time that it is read."""
    return source.path is not None and source.path.startswith(ENDPOINTS + DATABASES)


def read_rows(source: SourceConfig) -> Iterator[tuple[str, Row | DataError]]:
    """Yields (`file:line`, row) for every row between `skip` and `take`, or the error that stands in its place.

    What comes from an endpoint has the id of a judgement in place of the line.

    Raises:
        DataError: the source itself cannot be opened.
    """
    assert source.path is not None
    path = Path(source.path).expanduser()
    if source.path.startswith(ENDPOINTS):
        rows = _read_endpoint(source.path)
    elif source.path.startswith(DATABASES):
        rows = _read_database(source.path)
    elif path.exists():
        rows = (row for file in _files(path) for row in _read_file(file))
    elif source.path.startswith((".", "/", "~")) or source.path.endswith(SUFFIXES):
        raise DataError(f"data file {source.path} does not exist (looked from {Path.cwd()})")
    else:
        rows = _read_hub(source)
    return islice(rows, source.skip, None if source.take is None else source.skip + source.take)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
    if not files:
        raise DataError(f"{path}: holds no file of a known kind ({', '.join(SUFFIXES)})")
    return files


def _read_file(path: Path) -> Iterator[tuple[str, Row | DataError]]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    read = _read_lines if ".jsonl" in path.name else _read_json
    with _open(path) as file:
        yield from read(path, file)


def _open(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _read_lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, Row | DataError]]:
    number = 0
    try:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"{path}:{number}", _parse(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield f"{path}:{number + 1}", DataError(f"the compressed file is damaged from here on ({error})")


def _parse(line: bytes) -> Row | DataError:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"is not valid UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return DataError(f"is not valid JSON: {error.msg.removesuffix(' at')} at character {error.pos}")
    except RecursionError:
        return DataError("is nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return DataError(f"cannot be read: {error}")
    return row if isinstance(row, dict) else DataError(f"must be a JSON object, not {type(row).__name__}")


def _read_json(path: Path, file: BinaryIO) -> Iterator[tuple[str, Row | DataError]]:
    try:
        rows = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: must be a JSON list of objects, not {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", row if isinstance(row, dict) else DataError("must be a JSON object")


def _read_parquet(path: Path) -> Iterator[tuple[str, Row | DataError]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path}:{number}", row
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a readable parquet file: {error}") from error


def _read_hub(source: SourceConfig) -> Iterator[tuple[str, Row | DataError]]:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.path, name=source.name, data_dir=source.data_dir, split=source.split, streaming=source.streaming
        )
    except (
        Exception
    ) as error:  # datasets raises some twenty unrelated kinds, all of which mean that it cannot be loaded
        raise DataError(
            f"{source.path}: is neither a local file nor a dataset that can be loaded from the hub: {error}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source.path}:{number}", row


def _read_endpoint(url: str) -> Iterator[tuple[str, Row | DataError]]:
    """What people said to an endpoint, page by page."""
    import httpx

    from alignment.rewards.remote import key_from

    try:
        place = httpx.URL(url).copy_merge_params({"limit": PAGE})
    except httpx.InvalidURL as error:
        raise DataError(f"{url}: is no URL: {error}") from error
    where = str(place.copy_with(query=None))
    if not place.path.endswith("/feedback/export"):
        raise DataError(f"{where}: over HTTP, only an endpoint's …/v1/feedback/export is read; download other data")
    headers = {"Authorization": f"Bearer {key_from(KEY_VARIABLE)}"} if KEY_VARIABLE in os.environ else {}
    with httpx.Client(headers=headers, timeout=TIMEOUT_S) as client:
        while rows := [_parse(line) for line in _page(client, place, where)]:
            last = None
            for row in rows:
                last = row.get("id") if isinstance(row, dict) else None
                yield f"{where}:{last}", row
            if not isinstance(last, str) or last == place.params.get("since"):
                raise DataError(f"{where}: is no export of feedback: its last row has no new id")
            place = place.copy_merge_params({"since": last})


def _page(client: httpx.Client, url: httpx.URL, where: str) -> list[bytes]:
    import httpx

    try:
        response = client.get(url)
    except httpx.HTTPError as error:
        raise DataError(f"{where}: cannot be read: {error or type(error).__name__}") from error
    if response.status_code in (401, 403):
        raise DataError(f"{where}: is for administrators, and ${KEY_VARIABLE} does not hold the key of one")
    if response.status_code != 200:
        raise DataError(f"{where}: answers with HTTP status {response.status_code}")
    return response.content.splitlines()


def _read_database(url: str) -> Iterator[tuple[str, Row | DataError]]:
    """What people said to an endpoint, from its database: the judgements that count, in the order of their numbers."""
    import sqlalchemy as sa

    place = sa.make_url(url)
    if place.drivername == "sqlite":
        file = Path(place.database or "").expanduser()
        if not file.is_file():
            raise DataError(f"data file {file} does not exist (looked from {Path.cwd()})")
        place = place.set(database=str(file))
    number, row = sa.column("number", sa.BigInteger), sa.column("row", sa.Text)
    query = sa.select(number, row).select_from(sa.table("judgements")).order_by(number).limit(PAGE)
    query = query.where(row.is_not(None), sa.column("superseded_by").is_(None), number > sa.bindparam("last"))
    engine, last = sa.create_engine(place), 0
    try:
        while found := _select(engine, query, last):
            last = found[-1].number
            for each in found:
                yield f"{place.render_as_string()}:jdg-{each.number}", _parse(each.row.encode())
    finally:
        engine.dispose()


def _select(engine: sa.Engine, query: sa.Select[int, str], last: int) -> Sequence[sa.Row[int, str]]:
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with engine.connect() as connection:
            return connection.execute(query, {"last": last}).all()
    except SQLAlchemyError as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{engine.url.render_as_string()}: cannot be read: {reason}") from error
