"""One hostile key among well-behaved ones, on a real endpoint."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from serving.feedback.keys import create_key
from serving.feedback.store import Store
from serving.garbage import freeze_heap
from tests.processes import engine_processes
from tests.serving.conftest import Running, started
from tests.serving.test_hardening import longer

MODEL = "tiny"
OTHERS = 7
BEFORE_S, DURING_S = 60, 120
THINK_S = 0.3


@pytest.fixture(scope="module")
def service(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two replicas of a tiny model, with the limits that keys have by default."""
    folder = tmp_path_factory.mktemp("fair")
    settings = (f"name={MODEL}", "min_replicas=2", "max_replicas=2", "kv_cache_gib=0.2")
    with started(longer(tiny_model, folder / MODEL), folder, *settings) as running:
        yield running


@pytest.fixture
def frozen_heap() -> Iterator[None]:
    """A full collection of the garbage of what tests load would stop all clients here for most of a second."""
    freeze_heap()
    yield
    gc.unfreeze()


class Client(threading.Thread):
    """A well-behaved one: short requests, one after the other."""

    def __init__(self, url: str, key: str, content: str) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.refused: list[str] = []
        self.ends = threading.Event()
        self._body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 16}
        self._http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=300)

    def run(self) -> None:
        while not self.ends.wait(THINK_S):
            began = time.monotonic()
            answer = self._http.post("/v1/chat/completions", json=self._body)
            self.seconds.append(time.monotonic() - began)
            if answer.status_code != 200:
                self.refused.append(answer.text)


def watch(url: str, keys: list[str], seconds: float) -> list[Client]:
    clients = [Client(url, key, f"conversation {number}") for number, key in enumerate(keys)]
    for client in clients:
        client.start()
    time.sleep(seconds)
    for client in clients:
        client.ends.set()
    for client in clients:
        client.join()
    return clients


def percentile(clients: list[Client], share: float) -> float:
    return float(np.percentile([second for client in clients for second in client.seconds], share))


def memory_mib(service: Running) -> float:
    """Of the ingress, the replicas, their engines and what compiles beside them."""
    family = psutil.Process(service.process.pid).children(recursive=True)
    return sum(process.memory_info().rss for process in family if process.is_running()) / 2**20


@pytest.mark.alone
@pytest.mark.slow  # three minutes of load
def test_one_hostile_key_hurts_no_other(service: Running, frozen_heap: None) -> None:
    store = Store(service.database)
    names = ("hostile", *(f"user-{number}" for number in range(OTHERS)))
    keys = [create_key(store, name=name, role="user") for name in names]
    store.close()
    time.sleep(3)  # keys are read every second or two
    watch(service.url, keys[1:], 15)  # warm
    replicas = {process.pid for process in engine_processes(of=service.process.pid)}
    quiet, memory = watch(service.url, keys[1:], BEFORE_S), memory_mib(service)
    script = Path(__file__).with_name("hostile.py")
    with subprocess.Popen(
        # Its own work must not take what the endpoint has: it stands for a machine elsewhere.
        ["nice", "-n", "19", sys.executable, str(script), service.url, keys[0], MODEL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as hostile:
        loud = watch(service.url, keys[1:], DURING_S)
        during, _ = memory_mib(service), hostile.stdin.close()  # type: ignore[union-attr]
        told = hostile.stdout.read().decode()  # type: ignore[union-attr]
    time.sleep(30)
    for name, clients in (("before", quiet), ("during", loud)):
        shares = "  ".join(f"p{share} {percentile(clients, share):.3f} s" for share in (50, 90, 99))
        print(f"{name}: {sum(len(client.seconds) for client in clients)} requests, {shares}")
    print(f"memory: {memory:.0f} MiB before, {during:.0f} during, {memory_mib(service):.0f} afterwards")
    print(f"hostile: {told}")
    assert not [text for client in (*quiet, *loud) for text in client.refused]
    assert {process.pid for process in engine_processes(of=service.process.pid)} == replicas and len(replicas) == 2
    assert memory_mib(service) < memory + 800, "a process that compiles stays beside each replica"
    assert percentile(loud, 99) < 2 * percentile(quiet, 99)
