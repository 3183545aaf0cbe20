"""What `raylign serve` says of its start: why it failed, and that it is ready, which is true by then."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from serving.feedback.keys import create_key
from serving.feedback.store import Store
from tests.conftest import free_port
from tests.processes import without_wait_policy
from tests.serving.test_beside_others import cluster  # noqa: F401  # a fixture

LENGTH = 512
CACHE_GIB = 0.0003
"""Room for 300 tokens of the tiny model in fp32."""


@contextmanager
def serving(model: Path, folder: Path, *settings: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    ours = [f"folder={folder}", "name=tiny", "device=cpu", "dtype=fp32", f"max_model_len={LENGTH}", *settings]
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "serve", str(model), *ours],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=without_wait_policy() | environment,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=180)


def lines_until(process: subprocess.Popen[str], beginning: str) -> list[str]:
    """What was printed up to a line, which is the last one."""
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith(beginning):
            return lines
    raise AssertionError("\n".join(lines))


def ask(url: str, key: str) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=300)


def a_key(folder: Path) -> str:
    store = Store(f"sqlite:///{folder}/tiny/feedback.sqlite")
    try:
        return create_key(store, name="anna", role="user")
    finally:
        store.close()


@pytest.mark.slow
def test_a_start_that_fails_says_the_engines_own_reason_and_ends(tiny_model: Path, tmp_path: Path) -> None:
    with serving(tiny_model, tmp_path, f"port={free_port()}", f"kv_cache_gib={CACHE_GIB}") as process:
        told, _ = process.communicate(timeout=300)
    print(told)
    last = next(line for line in told.splitlines() if line.startswith("ServingError: The endpoint did not start."))
    assert re.search(
        rf"max_model_len = {LENGTH} tokens needs [\w. -]+ GiB of key-value cache, and there are [\w. -]+ GiB\. Raise "
        r"kv_cache_gib, or lower max_model_len to \d+ at most$",
        last,
    )
    assert process.returncode == 1 and "See root cause" not in told
    assert told.count("of key-value cache") == 1, "once more would have been in vain"


@pytest.mark.slow
def test_ready_says_that_nothing_is_loaded_where_replicas_sleep(tiny_model: Path, tmp_path: Path) -> None:
    port, key = free_port(), a_key(tmp_path)
    with serving(tiny_model, tmp_path, f"port={port}", "kv_cache_gib=0.1", "min_replicas=0") as process:
        assert "No replica runs yet (min_replicas=0)" in lines_until(process, "Ready")[-1]
        assert ask(f"http://127.0.0.1:{port}", key).status_code == 200


@pytest.mark.slow
def test_ready_is_true_on_a_cluster_that_others_have_started(
    cluster: dict[str, str],  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    port, key = free_port(), a_key(tmp_path)
    with serving(tiny_model, tmp_path, f"port={port}", "kv_cache_gib=0.1", **cluster) as process:
        lines = lines_until(process, "Ready")
        assert ask(f"http://127.0.0.1:{port}", key).status_code == 200, lines
