"""An HTTP client of a running endpoint, for `raylign promote` and its gate."""

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
from serving.registry.state import State
from serving.registry.versions import Version

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "RAYLIGN_KEY"
ADMIN = "/v1/admin/"
"""The beginning of the routes to versions, whose parameter `model` names one of several models."""
BUSY_STATUSES = {429, 503}
"""HTTP statuses of an endpoint that is too busy to accept a request now."""
MAX_ATTEMPTS = 8
"""How many times a request is sent while the endpoint is busy."""

Response = TypeVar("Response")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Replica(BaseModel):
    """A replica of an endpoint and the version that it holds."""

    replica: str
    """Name of the replica."""
    version: int
    """Number of the version that answers; 0 before the replica has loaded one."""
    error: str | None = None
    """Why the replica could not load a version; None if it could."""
    failed: int | None = None
    """Number of the version that `error` is about."""


class Listing(BaseModel):
    """The versions and replicas of an endpoint."""

    versions: list[Version]
    state: State
    replicas: list[Replica] = []
    candidate: Replica | None = None
    """The replica that holds a canary of whole weights beside the others; None if there is none."""


class Deletion(BaseModel):
    """An endpoint's answer when it has deleted a version."""

    freed_bytes: int


class EndpointClient:
    """A client of the endpoint at a URL. Several threads may share it.

    Every method raises a ServingError if the endpoint cannot be reached, refuses the request, or answers in an unknown
    form; the message quotes the endpoint's own.
    """

    def __init__(self, url: str, *, timeout_s: float, model: str | None = None) -> None:
        """Prepares the client; the first request opens a connection.

        Args:
            url: the endpoint, without `/v1`.
            timeout_s: seconds that the endpoint may be silent while it works on a request.
            model: name of the model whose versions are meant; None is the endpoint's only one.

        Raises:
            ConfigError: $RAYLIGN_KEY is set and holds no key.
        """
        import httpx

        self.url = url.rstrip("/")
        self.model = model
        headers = {"Authorization": f"Bearer {key_from(KEY_VARIABLE)}"} if os.environ.get(KEY_VARIABLE) else {}
        self._client = httpx.Client(headers=headers, timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def listing(self) -> Listing:
        """The model's versions, which of them answer, and its replicas."""
        return self.get("/v1/admin/versions", Listing)

    def register(self, checkpoint: str) -> Version:
        """Makes the endpoint copy and check a checkpoint, which it must see at the same path."""
        return self.post("/v1/admin/versions", {"checkpoint": checkpoint}, Version)

    def promote(self, number: int, *, canary: float | None = None) -> None:
        """Makes a version answer a share of the requests, or all; returns when every replica has loaded it."""
        self.post("/v1/admin/promote", {"version": number, "canary": canary}, dict)

    def delete(self, number: int) -> int:
        """Deletes a version's files; returns the bytes freed."""
        return self._request("DELETE", f"/v1/admin/versions/{number}", Deletion).freed_bytes

    def end_canary(self) -> None:
        """Ends the canary, if there is one: the current version answers all requests."""
        self._request("DELETE", "/v1/admin/canary", dict)

    def rollback(self) -> None:
        """Undoes the newest change."""
        self.post("/v1/admin/rollback", {}, dict)

    def get(self, path: str, response_type: type[Response]) -> Response:
        """Reads a path and parses the response, whose other fields are ignored. Repeats the request while the endpoint
        is busy."""
        return self._request("GET", path, response_type, max_attempts=MAX_ATTEMPTS)

    def post(
        self,
        path: str,
        body: dict[str, Any],
        response_type: type[Response],
        *,
        model_version: int | None = None,
        retry_when_busy: bool = False,
    ) -> Response:
        """Sends JSON and parses the response.

        Args:
            response_type: the form of the response; other fields are ignored.
            model_version: number of the version that must answer; None leaves the choice to the endpoint.
            retry_when_busy: whether to repeat the request while the endpoint is busy.
        """
        max_attempts = MAX_ATTEMPTS if retry_when_busy else 1
        return self._request(
            "POST", path, response_type, body=body, model_version=model_version, max_attempts=max_attempts
        )

    def _request(
        self,
        method: str,
        path: str,
        response_type: type[Response],
        *,
        body: dict[str, Any] | None = None,
        model_version: int | None = None,
        max_attempts: int = 1,
    ) -> Response:
        headers = {} if model_version is None else {"x-model-version": str(model_version)}
        for attempt in range(1, max_attempts + 1):
            response = self._send(method, path, body, headers)
            if response.status_code not in BUSY_STATUSES or attempt == max_attempts:
                break
            time.sleep(_pause_s(response, attempt))
        if not response.is_success:
            raise ServingError(f"{self.url} refuses {method} {path}: {_error_message(response)}")
        if model_version is not None and response.headers.get("x-model-version") != str(model_version):
            answered_by = response.headers.get("x-model-version", "nobody says which")
            raise ServingError(
                f"{self.url} was asked for an answer of version {model_version}, and gave one of {answered_by}"
            )
        try:
            return TypeAdapter(response_type).validate_json(response.content)
        except ValidationError as error:
            location = ".".join(map(str, error.errors()[0]["loc"])) or "the beginning"
            problems = f"{error.error_count()} problems, as at {location}"
            raise ServingError(f"{self.url}{path} answers in a form that is not raylign's: {problems}") from error

    def _send(self, method: str, path: str, body: dict[str, Any] | None, headers: dict[str, str]) -> httpx.Response:
        import httpx

        try:
            as_json = {"content-type": "application/json"}  # the endpoint requires it of every change, body or not
            parameters = {"model": self.model} if self.model is not None and path.startswith(ADMIN) else {}
            return self._client.request(
                method, self.url + path, json=body, headers=headers | as_json, params=parameters
            )
        except httpx.TimeoutException as error:
            raise ServingError(f"{self.url}{path} did not answer within {self._client.timeout.read:g} s") from error
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise ServingError(
                f"{self.url} cannot be reached ({error}); is an endpoint running there? --url says where"
            ) from error


def map_concurrently(
    function: Callable[[Item], Result], items: Sequence[Item], *, concurrency: int, description: str
) -> list[Result]:
    """Calls a function with every item, several at a time, and shows progress. Results are in the order of the items.

    Raises the function's first error; calls that have not begun by then are cancelled.
    """
    from tqdm import tqdm

    pool = ThreadPoolExecutor(concurrency)
    try:
        futures = [pool.submit(function, future) for future in items]
        return [future.result() for future in tqdm(futures, desc=description, disable=None)]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error, the calls in progress are not waited for


def _pause_s(response: httpx.Response, attempt: int) -> float:
    """Seconds until the next attempt: those that the endpoint asks for, else twice as many each time."""
    retry_after = response.headers.get("retry-after", "")
    return min(MAX_PAUSE_S, float(retry_after) if retry_after.isdecimal() else 2.0 ** (attempt - 2))


def _error_message(response: httpx.Response) -> str:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):  # the page of a proxy, or another service
        message = response.reason_phrase
    hint = f"; {KEY_VARIABLE} has to hold an admin's key" if response.status_code in (401, 403) else ""
    return f"{message} (HTTP status {response.status_code}{hint})"
