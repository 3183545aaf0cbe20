"""Who did what is written down, whatever happens to the database meanwhile."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI
from safetensors.torch import load_file, save_file

import serving.feedback.audit
from serving.config import LimitsConfig, ServeConfig
from serving.feedback.audit import AuditTrail
from serving.feedback.keys import Key, Role
from serving.feedback.recording import Recorder
from serving.feedback.store import Store, opening
from serving.feedback.store.records import AuditEntry, operator
from serving.http.access import AccessMiddleware
from serving.http.audit import AuditMiddleware
from serving.http.ingress import answer_errors
from serving.http.routes import IngressContext, audit, authorise, feedback
from serving.registry.models import ServedModels
from serving.registry.served_model import publish
from tests.databases import connection_to, new_database
from tests.serving.test_recording import away


def soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def context_over(store: Store, folder: Path) -> IngressContext:
    config = ServeConfig(checkpoint="x", feedback={"record": True})  # type: ignore[arg-type]
    others: Any = None  # what these routes do not use
    return IngressContext(
        config=config,
        models=ServedModels([]),
        store=store,
        metrics=others,
        ids=others,
        recorder=Recorder(store, folder),
    )


def guarded(store: Store, trail: AuditTrail) -> AccessMiddleware:
    """The routes of feedback and audit, and two that change something; the bearer is the key's role."""
    app = FastAPI(dependencies=[Depends(authorise)])
    router = APIRouter(tags=["admin"])

    @router.post("/v1/admin/promote")
    async def promote() -> dict[str, str]:
        return {}

    @router.post("/v1/admin/new")
    async def new() -> None:
        await asyncio.sleep(60)

    app.state.context = context_over(store, trail._folder.parent / "unstored")
    for each in (router, feedback.router, audit.router):
        app.include_router(each)

    answer_errors(app)

    def who(headers: list[bytes]) -> Key:
        role = cast(Role, headers[0].decode().removeprefix("Bearer "))
        return Key(name=f"the-{role}", role=role)

    return AccessMiddleware(
        AuditMiddleware(app, trail),
        authenticate=who,
        is_public=lambda _: False,
        limits=LimitsConfig(answers_in_progress=32),
    )


def ask(guard: AccessMiddleware, method: str, path: str, *, role: Role = "admin", **what: Any) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(guard, raise_app_exceptions=False, client=("192.0.2.7", 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, headers={"authorization": f"Bearer {role}"}, **what)

    return asyncio.run(asked())


def test_what_an_admin_changes_exports_and_deletes_is_written_down(database: str, tmp_path: Path) -> None:
    store = Store(database)
    trail = AuditTrail(store, tmp_path / "audit")
    guard = guarded(store, trail)
    assert ask(guard, "POST", "/v1/admin/promote", json={"version": 2, "canary": None}).status_code == 200
    assert ask(guard, "POST", "/v1/admin/promote", json={"version": 3, "canary": 0.1}).status_code == 200
    assert ask(guard, "POST", "/v1/admin/promote", json={"version": 4}, role="user").status_code == 403
    assert ask(guard, "GET", "/v1/feedback/export?limit=5").status_code == 200
    assert ask(guard, "GET", "/v1/feedback/statistics").status_code == 200
    assert ask(guard, "DELETE", "/v1/records/chatcmpl-1", json={}).status_code == 404
    soon(lambda: not list((tmp_path / "audit").iterdir()))
    told = ask(guard, "GET", "/v1/admin/audit").json()["data"]
    assert [(entry["action"], entry["detail"]) for entry in reversed(told)] == [
        ("promote", {"status": 200, "body": {"version": 2, "canary": None}}),
        ("canary", {"status": 200, "body": {"version": 3, "canary": 0.1}}),
        ("export", {"status": 200, "query": "limit=5"}),
        ("delete record", {"status": 404, "id": "chatcmpl-1"}),
    ]
    assert {(entry["who"], entry["address"]) for entry in told} == {("the-admin", "192.0.2.7")}
    assert abs(told[0]["created"] - time.time()) < 60
    rest = ask(guard, "GET", f"/v1/admin/audit?before={told[1]['id']}&limit=1").json()["data"]
    assert rest == [told[2]]
    assert ask(guard, "GET", "/v1/admin/audit", role="labeller").status_code == 403
    assert ask(guard, "GET", "/v1/admin/audit?before=nothing").status_code == 404
    trail.close()
    store.close()


def test_a_change_whose_client_went_away_is_written_down_too(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'feedback.sqlite'}")
    trail = AuditTrail(store, tmp_path / "audit")

    async def scene() -> None:
        async def receive() -> Any:
            await asyncio.sleep(0.05)
            return {"type": "http.request", "body": b"{}"} if next(messages) else {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            raise AssertionError("nobody listens any more")

        messages = iter([True, False])
        headers = [
            (b"authorization", b"Bearer admin"),
            (b"content-type", b"application/json"),
            (b"content-length", b"2"),
        ]
        scope = {"type": "http", "method": "POST", "path": "/v1/admin/new", "headers": headers, "query_string": b""}
        await guarded(store, trail)(scope, receive, send)

    asyncio.run(scene())
    soon(lambda: bool(store.audit_trail(limit=5)))
    (entry,) = store.audit_trail(limit=5)
    assert (entry.action, entry.who, entry.detail["status"]) == ("POST /v1/admin/new", "the-admin", None)
    trail.close()
    store.close()


def test_while_the_database_is_away_nothing_is_lost(
    postgresql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.feedback.audit, "RETRY_S", 0.2)
    database = new_database(postgresql)
    store = Store(database)
    trail = AuditTrail(store, tmp_path)
    name = database.rpartition("/")[2]
    with connection_to(f"{postgresql}/postgres") as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")  # type: ignore[call-overload]
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        trail.record(AuditEntry(action="promote", who="anna", detail={"body": {"version": 2}}))
        assert len(list(tmp_path.glob("aud-*.json"))) == 1
        trail.close()  # as if the process had ended
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")  # type: ignore[call-overload]
    again = AuditTrail(store, tmp_path)
    soon(lambda: not list(tmp_path.iterdir()))
    assert [(entry.action, entry.who) for entry in store.audit_trail(limit=5)] == [("promote", "anna")]
    again.close()
    store.close()


def test_the_same_entry_again_is_none(database: str) -> None:
    store = Store(database)
    entry = AuditEntry(action="export", who="anna")
    for _ in range(2):
        store.audit(entry).result()
    assert store.audit_trail(limit=5) == [entry]
    store.close()


def test_the_trail_is_listed_by_command(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'feedback.sqlite'}"
    store = Store(database)
    store.audit(AuditEntry(action="promote", who="anna", address="192.0.2.7", detail={"status": 200})).result()
    store.close()
    command = [sys.executable, "-m", "cluster.cli", "audit", "--database", database]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "promote" in told and "anna" in told and "192.0.2.7" in told and '{"status": 200}' in told


def test_an_entry_that_neither_the_disk_nor_the_database_takes_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "WAIT_S", 0.2)
    (tmp_path / "file").touch()
    lost: list[str] = []
    store = Store(f"sqlite:///{tmp_path / 'feedback.sqlite'}")
    trail = AuditTrail(store, tmp_path / "file" / "audit", on_loss=lambda: lost.append("one"))
    trail.record(AuditEntry(action="promote", who="anna", address=None, detail={}))
    soon(lambda: len(store.audit_trail(limit=5)) == 1)
    assert not lost
    with away(tmp_path):
        trail.record(AuditEntry(action="rollback", who="anna", address=None, detail={}))
        soon(lambda: lost == ["one"])
    trail.close()
    store.close()


def test_a_start_writes_down_what_it_made_of_the_versions(tiny_model: Path, tmp_path: Path) -> None:
    other = copied(tiny_model, tmp_path / "other")
    for checkpoint, promote in ((tiny_model, False), (other, False), (other, True)):
        publish(ServeConfig(checkpoint=str(checkpoint), folder=str(tmp_path), name="assistant", promote=promote))
    store = Store(f"sqlite:///{tmp_path / 'feedback.sqlite'}")
    files = tmp_path / "assistant" / "audit"
    assert len(list(files.iterdir())) == 3
    trail = AuditTrail(store, files)
    soon(lambda: not list(files.iterdir()))
    entries = sorted(store.audit_trail(limit=5), key=lambda entry: entry.created)
    changes = [(entry.detail["version"], entry.detail["before"], entry.detail["current"]) for entry in entries]
    assert changes == [(1, 0, 1), (2, 1, 1), (2, 1, 2)]
    assert {(entry.action, entry.who) for entry in entries} == {("start", operator())}
    trail.close()
    store.close()


def copied(model: Path, folder: Path) -> Path:
    """The same model with a weight that differs."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).add_(1.0)
    save_file(weights, file, metadata={"format": "pt"})
    return folder
