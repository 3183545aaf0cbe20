"""A Ray node that is told to end, as Kubernetes does by SIGTERM, lets what runs on it end first, for as long as a
variable says: the one that the files for Kubernetes set."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.kuberay import DRAIN
from tests.conftest import free_port

pytestmark = [pytest.mark.slow, pytest.mark.alone]
BIN = Path(sys.executable).parent
WORK = """
import sys, time, ray
from pathlib import Path
ray.init(sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=1)
def work(folder, seconds):
    Path(folder, "begun").touch()
    time.sleep(seconds)
    Path(folder, "ended").touch()

ray.get(work.remote(sys.argv[2], float(sys.argv[3])))
"""
"""A job of so many seconds."""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="raylign-", dir="/tmp"))  # Ray's sockets need a short path
    yield made
    shutil.rmtree(made, ignore_errors=True)


def ends_its_work(folder: Path, *, drain_s: float, work_s: float) -> bool:
    """Whether a node ends a job that it is doing when it is told to end."""
    port = free_port()
    environment = {**os.environ, DRAIN: str(drain_s), "RAY_AUTH_MODE": "disabled"}
    start = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1"]
    ports = [
        f"--port={port}",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--ray-client-server-port={free_port()}",
    ]
    quiet = ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder / 'ray'}"]
    with (folder / "log").open("w") as log:
        node = subprocess.Popen([*start, *ports, *quiet], env=environment, stdout=log, stderr=log)
        command = [sys.executable, "-c", WORK, f"127.0.0.1:{port}", str(folder), str(work_s)]
        wait_for_port(port, node)
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            limit = time.monotonic() + 120
            while not (folder / "begun").exists():
                assert time.monotonic() < limit and job.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            node.send_signal(signal.SIGTERM)
            node.wait(timeout=120)
        finally:
            job.kill()
            job.wait()
            node.kill()
    return (folder / "ended").exists()


def wait_for_port(port: int, node: subprocess.Popen[bytes]) -> None:
    import socket

    for _ in range(600):
        assert node.poll() is None, "the node has ended"
        with socket.socket() as asked:
            if asked.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the node did not come up")


@pytest.mark.parametrize(("drain_s", "work_s", "ends"), [(100, 8, True), (1, 100, False)])
def test_work_ends_if_the_drain_is_longer_than_it(folder: Path, drain_s: float, work_s: float, ends: bool) -> None:
    assert ends_its_work(folder, drain_s=drain_s, work_s=work_s) is ends
