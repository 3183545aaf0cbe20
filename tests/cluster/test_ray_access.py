"""Ray runs whatever it is sent: a Ray that answers those who have not its token is neither started nor joined."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from alignment.errors import ClusterError
from cluster.config import ClusterRunConfig
from cluster.launch import run
from cluster.ray_access import MODE, check_token, protect_token_file, require_token
from tests.conftest import free_port
from tests.processes import descendants, is_of_this_machine, listening

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def open_cluster() -> Iterator[str]:
    """Address of a Ray cluster without authentication."""
    port, folder = free_port(), tempfile.mkdtemp(prefix="raylign-", dir="/tmp")  # Ray's sockets need a short path
    start = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1"]
    ports = [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "ray-client-server-port")]
    quiet = ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}", f"--port={port}"]
    environment = {**os.environ, MODE: "disabled"}
    node = subprocess.Popen(
        [*start, *ports, *quiet], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(port, node)
        yield f"127.0.0.1:{port}"
    finally:
        node.terminate()
        node.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(port: int, node: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        assert node.poll() is None, "the node has ended"
        with socket.socket() as asked:
            if asked.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the node did not come up")


def test_our_own_ray_answers_nobody_without_its_token(ray_here: None) -> None:
    check_token(ray.get_runtime_context().gcs_address)


@pytest.mark.slow  # a run of its own on Ray
def test_a_run_on_this_machine_listens_to_this_machine_alone(
    ray_here: None, run_settings: dict[str, Any], tmp_path: Path
) -> None:
    """Its workers meet at a store of torch's and talk by gloo, neither of which asks who is there."""
    cluster = {"workers": 2, "cpus_per_worker": 1}
    config = ClusterRunConfig.model_validate({**run_settings, "steps": 60, "cluster": cluster})
    ports: dict[int, str] = {}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, config)
        while not running.done():
            ports |= listening(descendants())
            time.sleep(0.05)
    running.result()
    assert ports, "Ray's own at least"
    assert {port: address for port, address in ports.items() if not is_of_this_machine(address)} == {}


@pytest.mark.parametrize(
    "command",
    [
        ["train", "configs/align/demo.yaml", "cluster.workers=1"],
        ["serve"],
    ],
    ids=lambda command: command[0],
)
def test_a_cluster_that_answers_everybody_is_not_joined(
    open_cluster: str, tiny_model: Path, tmp_path: Path, command: list[str]
) -> None:
    environment = {**os.environ, "RAY_ADDRESS": open_cluster, "RAY_AUTH_TOKEN": "ab" * 32}
    environment.pop(MODE, None)
    places = [f"output={tmp_path}"]
    if command[0] == "serve":  # not the bundled model, of which the registry would keep a copy
        places = [str(tiny_model), "device=cpu", f"folder={tmp_path}", f"port={free_port()}"]
    ended = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *command, *places],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    assert f"the Ray cluster at {open_cluster} has no authentication" in ended.stderr.splitlines()[-1]
    assert "RAY_AUTH_MODE=token" in ended.stderr.splitlines()[-1]


def test_authentication_that_is_turned_off_is_an_error_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE, "disabled")
    with pytest.raises(ClusterError, match="RAY_AUTH_MODE=disabled turns Ray's authentication off"):
        require_token()


def test_a_cluster_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ClusterError, match="cannot be asked"):
        check_token(f"127.0.0.1:{free_port()}")


def test_the_token_that_ray_keeps_is_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    protect_token_file()  # there is none
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(0o644)
    protect_token_file()
    assert file.stat().st_mode & 0o777 == 0o600
