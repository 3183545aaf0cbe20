"""raylign from Python: the same files, settings and steps as the command line, for notebooks and scripts.

from cluster.api import load, score, serve, train

run = train(load("configs/align/demo.yaml", optim={"lr": 1e-4}))
print(run.metrics[-1])
with serve(run.path) as endpoint:
    print(endpoint.chat("What is the capital of France?"))
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import ClusterError
from alignment.run_folder import RunFolder
from cluster.config import ClusterRunConfig, load_run

START_LIMIT_S = 600.0
"""Seconds that an endpoint gets to start: its engine loads and compiles the model."""
STOP_LIMIT_S = 60.0
"""Seconds that an endpoint gets to finish what it is answering."""


def load(file: str | Path, *overrides: str, **settings: Any) -> ClusterRunConfig:
    """Reads a run's YAML file.

    Args:
        overrides: `"section.key=value"`, as on the command line.
        settings: the same as Python values, as `steps=24` or `optim={"lr": 1e-4}`; what a section does not name stays
            as the file has it.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong; the text lists every problem found.
    """
    return load_run(Path(file), [*overrides, *_as_overrides(settings)])


def train(config: ClusterRunConfig) -> TrainedRun:
    """Runs a configuration to its end, in this process or on a Ray cluster, as `cluster.workers` says.

    A run that was stopped goes on from its newest intact checkpoint.

    Raises:
        AlignmentError: any of its kinds; the text says what to do.
    """
    from cluster.launch import run

    run(config)
    return TrainedRun(config.folder)


def score(path: str | Path, prompt: str | Sequence[Mapping[str, str]], completions: Sequence[str]) -> list[float]:
    """Asks a reward model what it gives each completion of a prompt; higher is better.

    Args:
        path: a run or checkpoint of algorithm `reward_model`, any sequence classifier with one label, or a hub id.
        prompt: text, or the messages of a conversation, each with `role` and `content`.

    Raises:
        ModelError: there is no such model, or it has no trained score head.
    """
    import torch

    from alignment.groups import Completion, Group, Message
    from alignment.rewards.model import ModelScorer, RewardModel

    turns = prompt if isinstance(prompt, str) else tuple(Message(role=m["role"], content=m["content"]) for m in prompt)
    group = Group(id="prompt", prompt=turns, completions=tuple(Completion(text=text) for text in completions))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.closing(ModelScorer(RewardModel(path=str(path)), device)) as scorer:
        return scorer.score([group])[0]


@contextlib.contextmanager
def serve(path: str | Path, *overrides: str, **settings: Any) -> Iterator[Endpoint]:
    """Serves a run, checkpoint or model by `raylign serve` on this machine until the block ends.

    Only this machine reaches it, and no key is asked for. The model becomes the current version of a registry in
    `PATH/serving`, beside the feedback that the endpoint collects; of a hub id, in `runs/serving`.

    Args:
        overrides: `"key=value"` of the endpoint's configuration, as on the command line.
        settings: the same as Python values, as `max_model_len=1024`.

    Raises:
        ClusterError: the endpoint did not start; its own words have been printed.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    folder = (Path(path) if Path(path).is_dir() else Path("runs")) / "serving"
    database = f"feedback.database=sqlite:///{folder.resolve()}/feedback.sqlite"
    own_settings = [f"port={port}", "no_keys=true", "promote=true", f"folder={folder}", database]
    command = [
        sys.executable,
        "-m",
        "cluster.cli",
        "serve",
        str(path),
        *own_settings,
        *overrides,
        *_as_overrides(settings),
    ]
    process = subprocess.Popen(command)
    endpoint = Endpoint(url=f"http://127.0.0.1:{port}")
    try:
        endpoint.wait_until_ready(process)
        yield endpoint
    finally:
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class TrainedRun:
    """A run on disk."""

    path: Path

    @property
    def metrics(self) -> list[dict[str, float]]:
        """What was reported of every step, in order; `step` 0 is the untrained model."""
        return RunFolder(self.path).read_metrics()


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A running endpoint with OpenAI's API."""

    url: str
    """Without `/v1`."""

    def chat(self, question: str, **parameters: Any) -> str:
        """Asks the served model one question and returns its answer.

        Args:
            parameters: of the OpenAI API, as `temperature=0` or `max_tokens=64`.
        """
        from openai import OpenAI

        client = OpenAI(base_url=f"{self.url}/v1", api_key="none")
        model = client.models.list().data[0].id
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], **parameters
        )
        return reply.choices[0].message.content or ""

    def wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Returns when the endpoint answers.

        Raises:
            ClusterError: its process has ended, or it was not ready in time.
        """
        import httpx

        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ClusterError("`raylign serve` ended; its own words are above")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            time.sleep(0.5)
        raise ClusterError(f"`raylign serve` was not ready after {START_LIMIT_S:g} s")


def _as_overrides(settings: Mapping[str, Any], section: str = "") -> list[str]:
    """`section.key=value` of every value; JSON is YAML too."""
    overrides = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            overrides += _as_overrides(value, f"{section}{key}.")
        else:
            overrides.append(f"{section}{key}={json.dumps(value)}")
    return overrides
