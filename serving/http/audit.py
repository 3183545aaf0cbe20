"""Notices what admins do by any route, and has the audit trail record it (see `serving.feedback.audit`)."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.feedback.audit import AuditTrail
from serving.feedback.store.records import AuditEntry
from serving.http.access import READS

MAX_DETAIL = 2000
"""Most characters of a request's body that an entry holds."""
ACTIONS = {
    ("POST", "/v1/admin/versions"): "register",
    ("DELETE", "/v1/admin/versions/{number}"): "delete version",
    ("POST", "/v1/admin/promote"): "promote",
    ("DELETE", "/v1/admin/canary"): "end canary",
    ("POST", "/v1/admin/rollback"): "rollback",
    ("GET", "/v1/feedback/export"): "export",
    ("DELETE", "/v1/records/{id}"): "delete record",
}
"""The names of actions. Any other change that needs an admin is named by its method and path."""


class AuditMiddleware:
    """ASGI middleware between `serving.http.access` and the routes: adds an entry for what admins do, by any route.

    What a key may not do is refused, and gets no entry: otherwise anybody could fill the disk.
    """

    def __init__(self, app: ASGIApp, trail: AuditTrail) -> None:
        self._app = app
        self._trail = trail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                await self._record(scope, status)
            await send(message)

        try:
            await self._app(scope, receive, send_and_record)
        finally:
            if status is None:  # the client went away, or the request failed; what it began may continue
                await self._record(scope, None)

    async def _record(self, scope: Scope, status: int | None) -> None:
        action, key = action_of(scope), scope["state"]["key"]
        if action is not None and key.allows("admin"):
            detail = {"status": status, **_request_detail(scope)}
            client = scope.get("client")
            entry = AuditEntry(action=action, who=key.name, address=client[0] if client else None, detail=detail)
            await asyncio.to_thread(self._trail.record, entry)


def action_of(scope: Scope) -> str | None:
    """Returns the name of what a routed request does; None if it needs no entry."""
    route = scope.get("route")
    if route is None:
        return None
    method, path = scope["method"], route.path
    action = ACTIONS.get((method, path))
    if action == "promote" and _body(scope).get("canary") is not None:
        return "canary"
    is_change = next(iter(route.tags), "admin") == "admin" and method not in READS
    return action or (f"{method} {path}" if is_change else None)


def _body(scope: Scope) -> dict[str, Any]:
    body: dict[str, Any] = scope["state"].get("json", {})
    return body


def _request_detail(scope: Scope) -> dict[str, Any]:
    """Returns the parts of a request that say what it was about."""
    body, query = _body(scope), scope.get("query_string", b"").decode("latin-1")
    detail: dict[str, Any] = dict(scope.get("path_params", {}))
    if query:
        detail["query"] = query[:MAX_DETAIL]
    if body:
        detail["body"] = body if len(json.dumps(body)) <= MAX_DETAIL else "too long"
    return detail
