"""`ray job submit` against a local head with token authentication, as a user types it."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.cluster.conftest import POLLS
from tests.conftest import free_port
from tests.processes import assert_idle_threads_sleep, computes, descendants, without_wait_policy

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A running Ray head."""

    address: str
    environment: dict[str, str]

    def submit(self, *command: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = self.environment | ({"RAY_AUTH_TOKEN": token} if token else {})
        submit = [str(BIN / "ray"), "job", "submit", "--address", self.address, "--working-dir", ".", "--", *command]
        for _ in range(60):
            ended = subprocess.run(
                submit, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            if "No available agent" not in ended.stderr:  # the head is up a little before it can take jobs
                return ended
            time.sleep(1)
        raise AssertionError(ended.stderr)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = tempfile.mkdtemp(prefix="raylign-", dir="/tmp")  # Ray's sockets need a short path
    port = free_port()
    environment = {
        **without_wait_policy(),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
        **POLLS,
    }
    environment.pop("RAY_ADDRESS", None)
    start = f"{BIN}/ray start --head --block --num-cpus 2 --node-ip-address 127.0.0.1 --port {free_port()}"
    start += f" --dashboard-agent-listen-port {free_port()} --ray-client-server-port {free_port()}"
    start += f" --dashboard-port {port} --temp-dir {folder} --disable-usage-stats"
    with (Path(folder) / "head.log").open("w") as log:
        process = subprocess.Popen(start.split(), env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_up(address, process)
        yield Head(address, environment)
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def end(head: subprocess.Popen[bytes]) -> None:
    """Ends a head and all its processes; by itself, a head on which Ray Train has run takes half a minute."""
    processes = [psutil.Process(head.pid), *descendants(of=head.pid)]
    head.terminate()
    _, alive = psutil.wait_procs(processes, timeout=3)
    for process in alive:
        process.kill()
    head.wait(timeout=60)
    _, alive = psutil.wait_procs(alive, timeout=10)
    assert not alive


def wait_until_up(address: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(120):
        assert process.poll() is None, "the head has ended"
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2)
            return
        except urllib.error.HTTPError:  # it is up, and asks for the token
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the head did not come up")


def write_config(settings: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump({**settings, "cluster": {"workers": 1, "cpus_per_worker": 1}}))
    return path


def test_a_submitted_job_trains_and_its_logs_are_followed(
    head: Head, run_settings: dict[str, Any], tmp_path: Path
) -> None:
    config = write_config(run_settings, tmp_path / "run.yaml")
    workers: set[psutil.Process] = set()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(head.submit, "python", "-m", "cluster", str(config), "steps=3")
        while not job.done():
            workers |= set(found := [worker for worker in descendants("RayTrainWorker") if computes(worker)])
            if found:
                assert_idle_threads_sleep(found, may_end=True)
            time.sleep(0.1)
    ended = job.result()
    assert workers and ended.returncode == 0, ended.stdout + ended.stderr
    assert "step 3/3" in ended.stdout
    assert "succeeded" in ended.stdout
    assert (tmp_path / "runs" / "run" / "checkpoints" / "step-00000003" / "COMMITTED").is_file()


def test_a_job_that_fails_exits_with_an_error_and_says_why(
    head: Head, run_settings: dict[str, Any], tmp_path: Path
) -> None:
    config = write_config(run_settings, tmp_path / "run.yaml")
    ended = head.submit("python", "-m", "cluster", str(config), "optim.learning_rate=1")
    assert ended.returncode != 0
    assert "optim.learning_rate: unknown key" in ended.stdout + ended.stderr


def test_without_the_token_nothing_can_be_submitted(head: Head) -> None:
    ended = head.submit("echo", "hello", token=secrets.token_hex(32))
    assert ended.returncode != 0
    assert "hello" not in ended.stdout.splitlines()
