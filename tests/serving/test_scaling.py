"""Replicas come when there is much to do and go when there is not, parts of Ray Serve die, and no answer is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.processes import descendants
from tests.serving.conftest import Running, started

# Minutes of waiting for Ray Serve's own pauses: `pytest -m slow -s` shows how long.
pytestmark = [pytest.mark.slow, pytest.mark.alone]
MODEL = "tiny"


@pytest.fixture(scope="module")
def scaling(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A tiny model on no replica, one or two."""
    settings = (
        f"name={MODEL}",
        "min_replicas=0",
        "max_replicas=2",
        "target_ongoing_requests=2",
        "upscale_delay_s=1",
        "downscale_delay_s=5",
        "max_num_seqs=8",
        "limits.answers_in_progress=0",  # one key asks for all
        "kv_cache_gib=0.1",
    )
    with started(tiny_model, tmp_path_factory.mktemp("scaling"), *settings, ready="/healthz") as running:
        yield running


def chat(endpoint: Running, tokens: int = 4, content: str = "fox") -> httpx.Response:
    turns = [{"role": "user", "content": content}]
    body = {"model": MODEL, "messages": turns, "max_tokens": tokens, "ignore_eos": True}
    return endpoint.ask("POST", "/v1/chat/completions", body, role="user")


def replicas(endpoint: Running) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = endpoint.ask("GET", "/v1/admin/versions").json()["replicas"]
    return found


def until(condition: Callable[[], bool], seconds: float) -> float:
    """Waits; returns the seconds that it took."""
    started_at = time.monotonic()
    while not condition():
        assert time.monotonic() - started_at < seconds
        time.sleep(0.5)
    return time.monotonic() - started_at


@contextmanager
def asking(endpoint: Running, clients: int, tokens: int) -> Iterator[list[str]]:
    """Clients that ask without a pause; what failed."""
    failed: list[str] = []
    done = threading.Event()

    def ask(number: int) -> None:
        while not done.is_set():
            answer = chat(endpoint, tokens, f"fox {number}")
            if answer.status_code != 200:
                failed.append(answer.text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield failed
    finally:
        done.set()
        for thread in threads:
            thread.join()


def member(endpoint: Running, name: str) -> psutil.Process:
    """The one process of the endpoint with this name."""
    (found,) = descendants(name, of=endpoint.process.pid)
    return found


def test_the_first_request_starts_a_replica(scaling: Running) -> None:
    assert replicas(scaling) == []
    assert chat(scaling).status_code == 200
    assert len(replicas(scaling)) == 1


def test_a_burst_brings_a_second_replica_and_quiet_takes_both_away(scaling: Running) -> None:
    with asking(scaling, 1, tokens=20) as failed:
        with asking(scaling, 8, tokens=200) as failed_in_burst:
            up = until(lambda: len(replicas(scaling)) == 2, 120)
        down = until(lambda: len(replicas(scaling)) == 1, 120)
    assert not failed and not failed_in_burst
    gone = until(lambda: not replicas(scaling), 120)
    print(f"second replica after {up:.0f} s, one again after {down:.0f} s, none after {gone:.0f} s")


def test_a_controller_that_is_killed_is_not_noticed(scaling: Running) -> None:
    assert chat(scaling).status_code == 200
    killed = member(scaling, "ServeController")
    with asking(scaling, 4, tokens=20) as failed:
        killed.kill()
        time.sleep(8)
    assert not failed
    assert member(scaling, "ServeController").pid != killed.pid


def test_a_proxy_that_is_killed_is_back_within_seconds(scaling: Running) -> None:
    assert chat(scaling).status_code == 200
    member(scaling, "ProxyActor").kill()

    def answers() -> bool:
        try:
            return chat(scaling).status_code == 200
        except httpx.TransportError:
            return False

    print(f"the proxy was back after {until(answers, 60):.0f} s")
