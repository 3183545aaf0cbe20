"""Real endpoints for tests, started as a user starts them: Ray Serve, vLLM, keys, a database."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from serving.feedback.keys import create_key
from serving.feedback.store import Store
from tests.alignment.chat_templates import published
from tests.conftest import CHATML, free_port
from tests.processes import descendants, without_wait_policy
from tests.serving.writer import write_writer

BASE = "writer"
ALIGNED = "random-adapter"
WINDOW = 2048
MAX_TOKENS = 1500
"""Most tokens of an answer of the endpoint."""
START_TIMEOUT_S = 240


@dataclass(frozen=True, kw_only=True)
class Running:
    """An endpoint that answers."""

    process: subprocess.Popen[bytes]
    url: str
    output: Path
    folder: Path
    """Of its versions and its database."""
    keys: dict[str, str]
    """By role."""
    before: dict[str, int]
    """Status codes while the model was loading."""

    @property
    def database(self) -> str:
        return database_in(self.folder)

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys["admin"], max_retries=0)

    def ask(self, method: str, path: str, body: Any = None, *, role: str = "admin", **headers: str) -> httpx.Response:
        """One request, with the key of a role."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = {"authorization": f"Bearer {self.keys[role]}", "content-type": "application/json", **named}
        return httpx.request(method, self.url + path, json=body, headers=sent, timeout=300)


def database_in(folder: Path) -> str:
    return f"sqlite:///{folder}/raylign.sqlite"


@contextmanager
def started(checkpoint: Path | str, folder: Path, *settings: str, ready: str = "/readyz") -> Iterator[Running]:
    """`raylign serve`, ended afterwards; given when the path `ready` answers with status 200."""
    port, output = free_port(), folder / "output.txt"
    store = Store(database_in(folder))
    keys = {role: create_key(store, name=f"the-{role}", role=role) for role in ("user", "labeller", "admin")}  # type: ignore[arg-type]
    store.close()
    ours = [f"port={port}", f"folder={folder}", f"feedback.database={database_in(folder)}", "kv_cache_gib=0.5"]
    command = [sys.executable, "-m", "cluster.cli", "serve", str(checkpoint), *ours, *settings]
    with output.open("wb") as written:
        process = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, env=without_wait_policy())
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(process, f"{url}/healthz", output)
        bearer = {"authorization": f"Bearer {keys['user']}"}
        paths = ("/healthz", "/readyz", "/v1/models")
        before = {path: httpx.get(url + path, headers=bearer).status_code for path in paths}
        wait_for(process, url + ready, output)
        yield Running(process=process, url=url, output=output, folder=folder, keys=keys, before=before)
    finally:
        process.terminate()
        process.wait(180)


def wait_for(process: subprocess.Popen[bytes], url: str, output: Path) -> None:
    """Returns when a URL answers with status 200."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, output.read_text()
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"{url} did not answer within {START_TIMEOUT_S} s:\n{output.read_text()}")


def holding(endpoint: Running, *texts: str) -> list[Path]:
    """Files of the endpoint's output and logs that hold one of the texts."""
    commands = [" ".join(child.cmdline()) for child in descendants("/session_", of=endpoint.process.pid)]
    session = Path(next(found[0] for command in commands if (found := re.search(r"/[^\s=]*/session_[^/\s]+", command))))
    files = [file for file in (endpoint.output, *session.rglob("*")) if file.is_file() and not file.is_socket()]
    assert len(files) > 10
    return [file for file in files if any(text.encode() in file.read_bytes() for text in texts)]


def random_adapter(base: Path, seed: int) -> PeftModel:
    """A model with an adapter that, unlike a fresh one, is not zero: it has to change the answers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model whose answers are never empty; `BASE` is its name."""
    folder = tmp_path_factory.mktemp("base") / BASE
    write_writer(folder)
    return folder


@pytest.fixture(scope="session")
def adapted(writer: Path) -> PeftModel:
    return random_adapter(writer, 0)


def with_tools(template: str) -> str:
    """A chat template that teaches calls of tools as Qwen's does, and without tools is the one that is given."""
    return f"{{% if tools %}}{published()['qwen2_5']}{{% else %}}{template}{{% endif %}}"


@pytest.fixture(scope="session")
def endpoint(adapted: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """An adapter on a random model, in fp32; what people say is recorded."""
    folder = tmp_path_factory.mktemp("serving")
    adapted.save_pretrained(folder / ALIGNED)
    template = folder / "with_tools.jinja"
    template.write_text(with_tools(CHATML))
    settings = (
        f"chat_template={template}",
        "dtype=fp32",
        f"max_model_len={WINDOW}",
        "limits.max_body_mib=0.1",
        f"limits.max_tokens={MAX_TOKENS}",
    )
    with started(folder / ALIGNED, folder, *settings, "feedback.record=true", "rewards.max_length=512") as running:
        yield running


SMALL = "small"
SMALL_TOKENS = 8
"""Most tokens of an answer of the small endpoint."""


@pytest.fixture(scope="session")
def small_endpoint(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Whole weights, of the same random model; what people say is recorded, and the answers are rated beside it."""
    folder = tmp_path_factory.mktemp("small")
    settings = (
        f"name={SMALL}",
        "dtype=fp32",
        "kv_cache_gib=0.1",
        f"limits.max_tokens={SMALL_TOKENS}",
        "limits.max_n=2",
        "feedback.record=true",
        f"rewards.reference={writer}",
        "rewards.min_replicas=1",
        "rewards.max_length=128",
    )
    with started(writer, folder, *settings) as running:
        yield running


@pytest.fixture(scope="session")
def light_ray() -> Iterator[int]:
    """A Ray with Ray Serve for replicas that hold no model, and the port that this listens on. One application at a
    time may have routes there; each test or file deletes its own."""
    import ray
    from ray import serve

    from tests.serving.fleet import start_light_ray

    port = free_port()
    start_light_ray(port)
    yield port
    serve.shutdown()
    ray.shutdown()
