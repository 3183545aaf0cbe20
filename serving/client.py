"""A running endpoint, asked over HTTP: what `raylign promote` and its gate need of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from alignment.errors import ServingError
from alignment.rewards.remote import MAX_PAUSE_S, key_from
from serving.registry import State, Version

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "RAYLIGN_KEY"
BUSY = {429, 503}
"""HTTP statuses of an endpoint that has no room for a request just now."""
ATTEMPTS = 8
"""Times that a request is sent which an endpoint has no room for."""

Answer = TypeVar("Answer")
Given = TypeVar("Given")
Made = TypeVar("Made")


class Replica(BaseModel):
    """What a replica of an endpoint holds."""

    replica: str
    """Its name."""
    version: int
    """Number of the version that answers; 0 before it has loaded one."""
    error: str | None = None
    """Why it could not load what it was to."""
    failed: int | None = None
    """Number of the version that `error` is about."""


class Listing(BaseModel):
    """What an endpoint has."""

    versions: list[Version]
    state: State
    replicas: list[Replica] = []
    candidate: Replica | None = None
    """The replica that holds a canary of whole weights beside the others; None if there is none."""


class Deletion(BaseModel):
    """What an endpoint says of a version that it has deleted."""

    freed_bytes: int


class Service:
    """An endpoint at a URL. Safe to use from several threads.

    Every method raises a ServingError when the endpoint cannot be reached, refuses, or answers something else; the text
    has the endpoint's own words.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        """Opens no connection yet.

        Args:
            timeout_s: seconds that the endpoint may be silent while it works on a request.

        Raises:
            ConfigError: $RAYLIGN_KEY is set and holds no key.
        """
        import httpx

        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key_from(KEY_VARIABLE)}"} if os.environ.get(KEY_VARIABLE) else {}
        self._client = httpx.Client(headers=headers, timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def listing(self) -> Listing:
        """The versions, and which of them answers."""
        return self.get("/v1/admin/versions", Listing)

    def register(self, checkpoint: str) -> Version:
        """Has the endpoint copy and check a checkpoint, which it must see at the same path."""
        return self.post("/v1/admin/versions", {"checkpoint": checkpoint}, Version)

    def promote(self, number: int, *, canary: float | None = None) -> None:
        """Has a version answer a share of the requests, or all of them; returns when every replica has it."""
        self.post("/v1/admin/promote", {"version": number, "canary": canary}, dict)

    def delete(self, number: int) -> int:
        """Deletes a version's files; returns the bytes that were freed."""
        return self._ask("DELETE", f"/v1/admin/versions/{number}", Deletion).freed_bytes

    def end_canary(self) -> None:
        """Gives the canary's requests back to the current version, which may have been all along."""
        self._ask("DELETE", "/v1/admin/canary", dict)

    def rollback(self) -> None:
        """Takes the newest change back."""
        self.post("/v1/admin/rollback", {}, dict)

    def get(self, path: str, answer: type[Answer]) -> Answer:
        """Asks for something that has the form of `answer`, again while the endpoint has no room; more than that is
        left aside."""
        return self._ask("GET", path, answer, attempts=ATTEMPTS)

    def post(
        self,
        path: str,
        body: dict[str, Any],
        answer: type[Answer],
        *,
        version: int | None = None,
        patient: bool = False,
    ) -> Answer:
        """Sends JSON and reads the answer.

        Args:
            version: the model version that has to answer.
            patient: ask again when the endpoint has no room.
        """
        return self._ask("POST", path, answer, body=body, version=version, attempts=ATTEMPTS if patient else 1)

    def _ask(
        self,
        method: str,
        path: str,
        answer: type[Answer],
        *,
        body: dict[str, Any] | None = None,
        version: int | None = None,
        attempts: int = 1,
    ) -> Answer:
        headers = {} if version is None else {"x-model-version": str(version)}
        for attempt in range(1, attempts + 1):
            response = self._send(method, path, body, headers)
            if response.status_code not in BUSY or attempt == attempts:
                break
            time.sleep(_pause(response, attempt))
        if not response.is_success:
            raise ServingError(f"{self.url} refuses {method} {path}: {_words(response)}")
        if version is not None and response.headers.get("x-model-version") != str(version):
            told = response.headers.get("x-model-version", "nobody says which")
            raise ServingError(f"{self.url} was asked for an answer of version {version}, and gave one of {told}")
        try:
            return TypeAdapter(answer).validate_json(response.content)
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"])) or "the beginning"
            problems = f"{error.error_count()} problems, as at {place}"
            raise ServingError(f"{self.url}{path} answers in a form that is not raylign's: {problems}") from error

    def _send(self, method: str, path: str, body: dict[str, Any] | None, headers: dict[str, str]) -> httpx.Response:
        import httpx

        try:
            as_json = {"content-type": "application/json"}  # wanted of what changes something, also without a body
            return self._client.request(method, self.url + path, json=body, headers=headers | as_json)
        except httpx.TimeoutException as error:
            raise ServingError(f"{self.url}{path} did not answer within {self._client.timeout.read:g} s") from error
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise ServingError(
                f"{self.url} cannot be reached ({error}); is an endpoint running there? --url says where"
            ) from error


def side_by_side(ask: Callable[[Given], Made], given: Sequence[Given], *, concurrency: int, text: str) -> list[Made]:
    """Calls a function with every item, several at a time, under a progress bar; results in the items' order.

    Raises whatever the function raised first; what has not begun by then never does.
    """
    from tqdm import tqdm

    pool = ThreadPoolExecutor(concurrency)
    try:
        asked = [pool.submit(ask, each) for each in given]
        return [each.result() for each in tqdm(asked, desc=text, disable=None)]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error, nobody waits for the answers under way


def _pause(response: httpx.Response, attempt: int) -> float:
    """Seconds to wait: what the endpoint asks for, or twice as long each time."""
    asked = response.headers.get("retry-after", "")
    return min(MAX_PAUSE_S, float(asked) if asked.isdecimal() else 2.0 ** (attempt - 2))


def _words(response: httpx.Response) -> str:
    try:
        said = str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):  # a proxy's page, or another service
        said = response.reason_phrase
    hint = f"; {KEY_VARIABLE} has to hold an admin's key" if response.status_code in (401, 403) else ""
    return f"{said} (HTTP status {response.status_code}{hint})"
