"""An endpoint on a cluster that others use too: it replaces nothing that answers there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import free_port

BIN = Path(sys.executable).parent
OTHER = """
import sys
import ray
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Other:
    def __call__(self, request):
        return "still here"

ray.init(log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(Other.bind(), name="other", route_prefix="/")
print("runs", flush=True)
"""


def on_cluster(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """Environment for drivers of a Ray cluster with a token."""
    port, folder = free_port(), tempfile.mkdtemp(prefix="raylign-", dir="/tmp")  # Ray's sockets need a short path
    start = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1"]
    ports = [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "ray-client-server-port")]
    quiet = ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}", f"--port={port}"]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "cd" * 32}
    node = subprocess.Popen(
        [*start, *ports, *quiet], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        node.terminate()
        node.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.alone
def test_what_answers_on_a_cluster_is_not_replaced(cluster: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    import httpx

    port = free_port()
    first = on_cluster(cluster, "-c", OTHER, str(port))
    assert first.stdout.endswith("runs\n"), first.stderr
    url = f"http://127.0.0.1:{port}/"
    assert httpx.get(url).text == "still here"
    database = f"feedback.database=sqlite:///{tmp_path}/feedback.sqlite"
    settings = [f"port={port}", f"folder={tmp_path}", "name=assistant", "device=cpu", database]
    second = on_cluster(cluster, "-m", "cluster.cli", "serve", str(tiny_model), *settings)
    assert second.returncode == 1 and "The application 'other' answers on this cluster" in second.stderr
    assert httpx.get(url).text == "still here"


def test_settings_of_autoscaling_are_those_that_ray_will_take_further_on() -> None:
    from ray.serve.config import AutoscalingConfig

    from serving.app import _candidate_options, _engine_options, _scoring_options
    from serving.config import ServeConfig

    config = ServeConfig(checkpoint="x")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for options in (_engine_options, _scoring_options, _candidate_options):
            AutoscalingConfig(**options(config, "cpu")["autoscaling_config"])
