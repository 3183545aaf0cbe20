"""Another model version behind the same endpoint, under load: nobody notices but by the answers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.models.folders import bundled
from tests.processes import descendants, engine_processes
from tests.serving.conftest import ALIGNED, Running, random_adapter, started

QUESTION = "What is the capital of France, and what is it known for?"
TURNS = [{"role": "user", "content": QUESTION}]
TOKENS = 12


def greedy(model: Any) -> str:
    """What transformers answers."""
    tokenizer = AutoTokenizer.from_pretrained(bundled())
    inputs = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@dataclass
class Seen:
    """What clients saw."""

    failed: list[str] = field(default_factory=list)
    answers: dict[str, set[str]] = field(default_factory=dict)
    """By version."""
    count: int = 0


@contextmanager
def load(endpoint: Running, model: str, *, clients: int = 4) -> Iterator[Seen]:
    """Clients that ask without a pause, half of them by streams."""
    seen, done = Seen(), threading.Event()

    def ask(stream: bool) -> None:
        while not done.is_set():
            body = {"model": model, "messages": TURNS, "max_tokens": TOKENS, "temperature": 0, "stream": stream}
            answer = endpoint.ask("POST", "/v1/chat/completions", body, role="user")
            seen.count += 1
            if answer.status_code != 200 or '"error"' in answer.text:
                seen.failed.append(answer.text)
            elif not stream:
                text = answer.json()["choices"][0]["message"]["content"]
                assert answer.json()["system_fingerprint"] == answer.headers["x-model-version"]
                seen.answers.setdefault(answer.headers["x-model-version"], set()).add(text)

    threads = [threading.Thread(target=ask, args=(number % 2 == 1,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        done.set()
        for thread in threads:
            thread.join()


def raylign(endpoint: Running, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alignment.cli", *arguments, "--url", endpoint.url]
    environment = {**os.environ, "RAYLIGN_KEY": endpoint.keys["admin"]}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def one_answer(endpoint: Running, model: str, **headers: str) -> tuple[str, str]:
    """The version and the text."""
    body = {"model": model, "messages": TURNS, "max_tokens": TOKENS, "temperature": 0}
    answer = endpoint.ask("POST", "/v1/chat/completions", body, **headers)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-model-version"], answer.json()["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Another adapter, and what it answers."""
    model, folder = random_adapter(1), tmp_path_factory.mktemp("other") / "other-adapter"
    model.save_pretrained(folder)
    return folder, greedy(model)


def test_an_adapter_is_swapped_under_load_and_back(endpoint: Running, adapted: Any, other: tuple[Path, str]) -> None:
    folder, text = other
    with load(endpoint, ALIGNED) as seen:
        time.sleep(1)
        promoted = raylign(endpoint, "promote", str(folder))
        assert promoted.returncode == 0, promoted.stdout + promoted.stderr
        after = one_answer(endpoint, ALIGNED)
        time.sleep(1)
    assert after == ("2", text)
    assert not seen.failed
    assert seen.answers == {"1": {greedy(adapted)}, "2": {text}}
    assert raylign(endpoint, "rollback").returncode == 0
    assert one_answer(endpoint, ALIGNED) == ("1", greedy(adapted))
    assert "current" in raylign(endpoint, "versions").stdout


def test_a_canary_answers_its_share_and_whoever_asks_for_it(endpoint: Running, other: tuple[Path, str]) -> None:
    assert raylign(endpoint, "promote", str(other[0]), "--canary", "0.5").returncode == 0
    with ThreadPoolExecutor(8) as pool:
        drawn = set(pool.map(lambda _: one_answer(endpoint, ALIGNED)[0], range(24)))
    assert drawn == {"1", "2"}
    assert one_answer(endpoint, ALIGNED, x_model_version="2") == ("2", other[1])
    assert raylign(endpoint, "rollback").returncode == 0
    assert {one_answer(endpoint, ALIGNED)[0] for _ in range(8)} == {"1"}


@pytest.mark.parametrize("damage", ["absent", "cut", "nan", "shape", "base"])
def test_a_checkpoint_that_does_not_fit_is_refused_before_anybody_notices(
    endpoint: Running, other: tuple[Path, str], tmp_path: Path, damage: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "candidate"
    shutil.copytree(other[0], folder)
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "absent":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "base":
        settings.write_text(settings.read_text().replace(str(bundled()), "somebody/another-model"))
    else:
        tensors = load_file(file)
        name = next(iter(tensors))
        tensors[name] = tensors[name] * float("nan") if damage == "nan" else tensors[name][:, :-1].contiguous()
        save_file(tensors, file)
    before = one_answer(endpoint, ALIGNED)
    refused = raylign(endpoint, "promote", str(folder))
    assert refused.returncode != 0 and "Traceback" not in refused.stderr
    assert one_answer(endpoint, ALIGNED) == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path, list[str]]]:
    """An endpoint of whole weights, the folder of others of the same shape, and what both answer."""
    folder = tmp_path_factory.mktemp("whole")
    texts = []
    for number, name in enumerate(("first", "second")):
        model = AutoModelForCausalLM.from_pretrained(bundled(), dtype=torch.float32)
        torch.manual_seed(number)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.03 * number * weight.std() * torch.randn_like(weight)
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(bundled()).save_pretrained(folder / name)
        texts.append(greedy(model))
    with started(folder / "first", folder, "name=model", "dtype=fp32", "max_model_len=512") as running:
        yield running, folder / "second", texts


def test_whole_weights_are_swapped_under_load(whole: tuple[Running, Path, list[str]]) -> None:
    endpoint, folder, texts = whole
    assert texts[0] != texts[1]
    with load(endpoint, "model") as seen:
        time.sleep(1)
        promoted = raylign(endpoint, "promote", str(folder))
        assert promoted.returncode == 0, promoted.stdout + promoted.stderr
        after = one_answer(endpoint, "model")
        time.sleep(1)
    assert after == ("2", texts[1])
    assert not seen.failed
    assert seen.answers == {"1": {texts[0]}, "2": {texts[1]}}


def test_rewards_of_whole_weights_without_a_reference_are_refused_in_words(
    whole: tuple[Running, Path, list[str]],
) -> None:
    answer = whole[0].ask("POST", "/v1/rewards", {"items": [{"prompt": "x", "completions": ["y"]}]})
    assert answer.status_code == 409
    assert "rewards.reference" in answer.json()["error"]["message"]


def test_a_restarted_replica_has_the_current_version(whole: tuple[Running, Path, list[str]]) -> None:
    endpoint, _, texts = whole
    (engine,) = engine_processes(of=endpoint.process.pid)
    engine.kill()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        body = {"model": "model", "messages": TURNS, "max_tokens": TOKENS, "temperature": 0}
        answer = endpoint.ask("POST", "/v1/chat/completions", body)
        if answer.status_code == 200:
            break
        assert answer.status_code == 503, answer.text
        time.sleep(1)
    assert answer.headers["x-model-version"] == "2"
    assert answer.json()["choices"][0]["message"]["content"] == texts[1]


def test_it_stops_on_a_signal_and_leaves_no_process(whole: tuple[Running, Path, list[str]]) -> None:
    endpoint = whole[0]
    family = descendants(of=endpoint.process.pid)
    assert len(family) > 5
    endpoint.process.send_signal(signal.SIGINT)
    assert endpoint.process.wait(30) == 0
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert endpoint.output.read_text().splitlines()[-1] == "Stopped."
