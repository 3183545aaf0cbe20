"""One endpoint per registry: who has it, who is refused, who waits, and when it is free again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.files import write_durably
from serving.registry import lease as module
from serving.registry.lease import FILE, LEASES, Lease, LeaseTaken, Process, Tenant, lease_of
from serving.registry.versions import Registry
from tests.conftest import free_port
from tests.serving.tiny import whole

FORK = multiprocessing.get_context("fork")
URL = "http://127.0.0.1:8000"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "prod")


@pytest.fixture
def tenants(registry: Registry) -> Iterator[Callable[[str], Tenant]]:
    """Makes tenants of this process, which are no more at the end."""
    made: list[Tenant] = []

    def make(owner: str) -> Tenant:
        made.append(Tenant(registry, owner=owner, url=URL))
        return made[-1]

    yield make
    for tenant in made:
        tenant.close()


def elsewhere(registry: Registry, *, age_s: float = 0.0, owner: str = "theirs") -> Lease:
    """Another machine's endpoint has the registry, and wrote so a while ago by its own clock."""
    process = Process(host="node-7", machine="m7", pid=17, started="1", heartbeat=time.time() - age_s)
    lease = Lease(owner=owner, url="http://node-7:8000", began=1.7e9, processes=(process,))
    registry.folder.mkdir(parents=True, exist_ok=True)
    write_durably(registry.folder / FILE, LEASES.dump_json(lease))
    return lease


def holder(folder: Path, ready: Any) -> None:
    tenant = Tenant(Registry(folder), owner="another", url="http://127.0.0.1:8000")
    assert tenant.acquire()
    ready.set()
    time.sleep(600)


def test_a_free_registry_is_taken_and_given_back(registry: Registry, tenants: Callable[[str], Tenant]) -> None:
    tenant = tenants("ours")
    assert tenant.acquire() and tenant.is_held
    tenant.check()
    lease = lease_of(registry)
    assert lease is not None and (lease.owner, lease.url) == ("ours", URL)
    assert [process.pid for process in lease.processes] == [os.getpid()]
    tenant.close()
    assert lease_of(registry) is None and not (registry.folder / FILE).exists()


def test_a_second_endpoint_is_refused_and_told_by_whom_and_since_when(
    registry: Registry, tenants: Callable[[str], Tenant]
) -> None:
    ready = FORK.Event()
    other = FORK.Process(target=holder, args=(registry.folder, ready))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(
            LeaseTaken, match=rf"belongs to the endpoint {URL} on \S+ \(process {other.pid}\), since 20"
        ):
            tenants("ours").acquire()
        candidate = tenants("ours")
        assert not candidate.acquire(wait=True)
        with pytest.raises(LeaseTaken, match="changes no versions yet"):
            candidate.check()
    finally:
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert candidate.try_acquire() is None, "of a process of this machine it is known that it has died"
    candidate.check()


def test_a_process_that_got_a_dead_one_s_number_is_not_taken_for_it(
    registry: Registry, tenants: Callable[[str], Tenant]
) -> None:
    ours = module._current_process()
    lease = Lease(owner="theirs", url=URL, began=1.7e9, processes=(replace(ours, started="another time"),))
    registry.folder.mkdir(parents=True)
    write_durably(registry.folder / FILE, LEASES.dump_json(lease))
    assert tenants("ours").acquire()


def test_the_ingresses_of_an_endpoint_share_its_lease_and_the_last_gives_it_back(registry: Registry) -> None:
    ready = [FORK.Event(), FORK.Event()]
    children = [FORK.Process(target=holder, args=(registry.folder, event)) for event in ready]
    for child, event in zip(children, ready, strict=True):
        child.start()
        assert event.wait(60)
    for child in children:
        lease = lease_of(registry)
        assert lease is not None and lease.owner == "another"
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert lease_of(registry) is None


def test_a_lease_of_another_machine_counts_while_it_is_renewed_whatever_its_clock_says(
    registry: Registry, tenants: Callable[[str], Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(module, "WATCH_TIME_S", 0.6)
    for age_s in (3600.0, -3600.0):  # its clock is an hour late, or early
        elsewhere(registry, age_s=age_s)

        def beat(line: str, age_s: float = age_s) -> None:
            assert "was silent lately" in line
            elsewhere(registry, age_s=age_s - 0.001)

        with pytest.raises(LeaseTaken, match="node-7"):
            tenants("ours").acquire(notify=beat)
        assert tenants("ours").acquire(notify=lambda line: None), "nobody renewed it this time"
        (registry.folder / FILE).unlink()
    elsewhere(registry)
    with pytest.raises(LeaseTaken, match="node-7"):
        tenants("third").acquire()


def test_a_candidate_takes_over_when_the_other_has_ended_or_is_silent(
    registry: Registry, tenants: Callable[[str], Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_TIMEOUT_S", 0.5)
    elsewhere(registry, age_s=-0.4)
    candidate = tenants("ours")
    assert candidate.try_acquire() is not None
    end = time.monotonic() + 60
    while candidate.try_acquire() is not None:
        assert time.monotonic() < end
        time.sleep(0.05)
    candidate.check()
    elsewhere(registry)  # it was only slow, and finds its place taken
    (registry.folder / FILE).unlink()
    assert tenants("ours").try_acquire() is None


def test_whoever_lost_the_lease_changes_nothing_any_more(registry: Registry, tenants: Callable[[str], Tenant]) -> None:
    ours = tenants("ours")
    assert ours.acquire()
    elsewhere(registry)
    assert ours.try_acquire() is not None
    with pytest.raises(LeaseTaken, match="belongs to the endpoint http://node-7:8000 on node-7"):
        ours.check()


def test_of_many_that_start_at_once_one_gets_it(registry: Registry) -> None:
    def start(owner: int, results: Any) -> None:
        try:
            Tenant(registry, owner=str(owner), url=URL).acquire()
            results.put(owner)
            time.sleep(600)
        except LeaseTaken:
            results.put(None)

    results = FORK.Queue()
    children = [FORK.Process(target=start, args=(owner, results)) for owner in range(5)]
    for child in children:
        child.start()
    winners = [winner for _ in children if (winner := results.get(timeout=60)) is not None]
    for child in children:
        child.kill()
        child.join()
    assert len(winners) == 1


def test_a_second_serve_of_a_running_registry_ends_at_once_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "serving"
    registry = Registry(folder / "prod")
    registry.add(whole(tmp_path / "first"))
    before = registry.promote(1)
    tenant = Tenant(registry, owner="running", url=URL)
    assert tenant.acquire()
    try:
        settings = ["name=prod", f"folder={folder}", f"port={free_port()}", "no_keys=true"]
        command = [sys.executable, "-m", "cluster.cli", "serve", str(whole(tmp_path / "second", seed=2)), *settings]
        done = subprocess.run([*command, "--promote"], capture_output=True, text=True, timeout=250)
    finally:
        tenant.close()
    assert done.returncode == 1 and "LeaseTaken" in done.stderr and "raylign promote" in done.stderr
    assert registry.state() == before and len(registry.versions()) == 1


def test_another_cluster_s_endpoint_is_built_without_changing_what_the_first_one_serves(tmp_path: Path) -> None:
    from serving import build
    from serving.config import ServeConfig
    from serving.registry.served_model import registry_of

    arguments = {"name": "prod", "folder": str(tmp_path / "serving"), "device": "cpu"}
    first = {**arguments, "checkpoint": str(whole(tmp_path / "first"))}
    build(first)
    registry = registry_of(ServeConfig.model_validate(first))
    assert registry.state().current == 1
    elsewhere(registry)
    second = {**arguments, "checkpoint": str(whole(tmp_path / "second", seed=2)), "promote": True}
    build(second)
    assert (registry.state().current, len(registry.versions())) == (1, 2)
    with pytest.raises(LeaseTaken, match="node-7"):
        build({**second, "on_lease": "refuse"})
    (registry.folder / FILE).unlink()
    build(second)
    assert registry.state().current == 2
