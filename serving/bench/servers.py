"""The servers that the benchmark compares: the endpoints of this and of another checkout, vLLM, and Ray Serve LLM."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.environment import IDLE_THREADS
from alignment.errors import ServingError

START_TIMEOUT_S = 300.0
ENDPOINTS = ("ours", "before")
"""The endpoint of this checkout, and that of another one."""
MODEL_NAME = "bench"
"""The name that requests give as `model`, for every server."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """The settings that all servers have in common."""

    model: str
    """Folder or hub id."""
    folder: Path
    """For logs, and for the endpoints' own files."""
    max_num_seqs: int
    has_rewards: bool
    """Whether the endpoint also answers requests for rewards."""
    baseline: Path | None = None
    """Another checkout of this project, whose endpoint is measured too."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server."""

    name: str
    url: str
    model: str
    """The name that requests give as `model`."""
    key: str | None
    process: int
    """Id of the process that started all of its others."""

    @property
    def headers(self) -> dict[str, str]:
        """The headers that a request needs."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


@contextmanager
def running_server(name: str, settings: BenchSettings) -> Iterator[Server]:
    """Starts a server, and ends it after the `with` block.

    Args:
        name: `ours`, `before`, `vllm` or `ray`.

    Raises:
        ServingError: the server does not start.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    is_endpoint = name in ENDPOINTS
    checkout = settings.baseline if name == "before" else None
    commands: dict[str, Callable[[], list[str]]] = {
        "vllm": lambda: ["-m", "vllm.entrypoints.openai.api_server", *vllm_arguments(settings, port)],
        "ray": lambda: ["-m", "serving.bench.ray_serve_llm", settings.model, str(port), str(settings.max_num_seqs)],
        **dict.fromkeys(
            ENDPOINTS, lambda: [*_raylign(checkout), "serve", settings.model, *endpoint_settings(name, settings, port)]
        ),
    }
    log = settings.folder / f"{name}.log"
    key = _create_key(name, settings, checkout) if is_endpoint else None
    print(f"Starting {name} …", flush=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *commands[name]()], stdout=output, stderr=subprocess.STDOUT, **_environment(checkout)
        )
    try:
        path = "/readyz" if is_endpoint else {"vllm": "/health", "ray": "/v1/models"}[name]
        _wait_for(process, url + path, log)
        yield Server(name=name, url=url, model=MODEL_NAME, key=key, process=process.pid)
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """A TCP port of this machine that no process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server_socket:
        return int(server_socket.getsockname()[1])


def vllm_arguments(settings: BenchSettings, port: int) -> list[str]:
    """The arguments of vLLM's own server, with the same engine settings as the endpoint's."""
    values = {
        **engine_settings(settings.max_num_seqs),
        **{"model": settings.model, "served-model-name": MODEL_NAME, "host": "127.0.0.1", "port": port},
    }
    flags = ["--enforce-eager", "--no-enable-chunked-prefill", "--disable-uvicorn-access-log"]
    return [argument for name, value in values.items() for argument in (f"--{name}", str(value))] + flags


def engine_settings(max_num_seqs: int) -> dict[str, int | str]:
    """The engine settings of all servers, under the names of vLLM's flags."""
    from alignment.models.load import dtype_name

    return {
        "dtype": dtype_name("auto", "cpu"),
        "max-model-len": 1024,
        "max-num-seqs": max_num_seqs,
        "kv-cache-memory-bytes": 2**29,
    }


def endpoint_settings(name: str, settings: BenchSettings, port: int) -> list[str]:
    """The endpoint's settings, as arguments of `raylign serve`."""
    from alignment.models.load import number_format

    return [
        f"port={port}",
        f"folder={settings.folder / name}",
        f"feedback.database={_database(name, settings)}",
        f"name={MODEL_NAME}",
        f"dtype={number_format('auto', 'cpu')}",
        "max_model_len=1024",
        f"max_num_seqs={settings.max_num_seqs}",
        "kv_cache_gib=0.5",
        f"rewards.min_replicas={int(settings.has_rewards)}",
        f"rewards.reference={settings.model}",
        "feedback.record=true",
    ]


def _database(name: str, settings: BenchSettings) -> str:
    return f"sqlite:///{settings.folder}/{name}.sqlite"


def _create_key(name: str, settings: BenchSettings, checkout: Path | None) -> str:
    create = ["keys", "create", "--name", "bench", "--role", "admin", "--database", _database(name, settings)]
    command = [sys.executable, *_raylign(checkout), *create]
    result: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, **_environment(checkout)
    )
    if result.returncode:
        raise ServingError(f"no key could be made:\n{result.stdout[-1000:]}{result.stderr[-1000:]}")
    return result.stdout.strip().splitlines()[-1]


def _raylign(checkout: Path | None) -> list[str]:
    """The arguments of Python that run `raylign`; earlier checkouts have the command line in another package."""
    is_earlier = checkout is not None and (checkout / "alignment" / "cli.py").is_file()
    return ["-m", "alignment.cli" if is_earlier else "cluster.cli"]


def _environment(checkout: Path | None) -> dict[str, Any]:
    """Environment and folder of a server's process, as arguments of `subprocess`.

    Args:
        checkout: another checkout of this project, whose code the process runs; None for this one.
    """
    threads = str(len(os.sched_getaffinity(0)))
    variables = {**os.environ, "OMP_NUM_THREADS": threads, "VLLM_NO_USAGE_STATS": "1", "TORCH_COMPILE_DISABLE": "1"}
    variables["RAY_worker_niceness"] = "0"  # as the endpoint sets it; else Ray Serve LLM would have a lower priority
    if checkout is None:
        return {"env": variables}
    # The other checkout sets its own variables for idle threads, as far as it has any.
    variables = {name: value for name, value in variables.items() if IDLE_THREADS.get(name) != value}
    return {"env": {**variables, "PYTHONPATH": str(checkout)}, "cwd": checkout}


def _wait_for(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    import httpx

    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise ServingError(f"a server did not start:\n{log.read_text(errors='replace')[-2000:]}")
