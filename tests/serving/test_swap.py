"""Another model version behind the same endpoint, under load: nobody notices but by the answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sqlalchemy import create_engine
from sqlalchemy import text as sql
from transformers import AutoTokenizer

from serving.registry.versions import Registry
from serving.replica.routing import canary_answers
from tests.serving.conftest import ALIGNED, Running, random_adapter

QUESTION = "What is the capital of France, and what is it known for?"
TURNS = [{"role": "user", "content": QUESTION}]
TOKENS = 8


@cache
def greedy(model: Any) -> str:
    """What transformers answers."""
    tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
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
    command = [sys.executable, "-m", "cluster.cli", *arguments, "--url", endpoint.url]
    environment = {**os.environ, "RAYLIGN_KEY": endpoint.keys["admin"]}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def one_answer(endpoint: Running, model: str, **headers: str) -> tuple[str, str]:
    """The version and the text."""
    body = {"model": model, "messages": TURNS, "max_tokens": TOKENS, "temperature": 0}
    answer = endpoint.ask("POST", "/v1/chat/completions", body, **headers)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-model-version"], answer.json()["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def other(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Another adapter, and what it answers."""
    model, folder = random_adapter(writer, 1), tmp_path_factory.mktemp("other") / "other-adapter"
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


def test_an_adapter_that_overflows_is_refused_and_spoils_nothing(
    endpoint: Running, writer: Path, tmp_path: Path
) -> None:
    before = one_answer(endpoint, ALIGNED)
    model, folder = random_adapter(writer, 2), tmp_path / "overflowing-adapter"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.fill_(1e38)
    model.save_pretrained(folder)
    for arguments in ((), ("--canary", "0.5")):
        promoted = raylign(endpoint, "promote", str(folder), *arguments)
        assert promoted.returncode == 1 and "log-probabilities are not finite" in promoted.stderr, promoted.stderr
    for number in range(20):
        body = {"model": ALIGNED, "prompt": f"Lake {number} has", "max_tokens": 2, "temperature": 0, "logprobs": 1}
        answer = endpoint.ask("POST", "/v1/completions", body).json()
        assert None not in answer["choices"][0]["logprobs"]["token_logprobs"], number
    assert one_answer(endpoint, ALIGNED) == before


def version_of(endpoint: Running, *contents: str, model: str = ALIGNED) -> str:
    """Which version answers a conversation."""
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    answer = endpoint.ask("POST", "/v1/chat/completions", {"model": model, "messages": turns, "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    return answer.headers["x-model-version"]


def compared_versions(endpoint: Running, question: str) -> str:
    """The versions of the two answers of a comparison, as the database has them."""
    turns = [{"role": "user", "content": question}]
    body = {"messages": turns, "max_tokens": 8, "temperature": 2.0}
    compared = endpoint.ask("POST", "/v1/comparisons", body)
    assert compared.status_code == 200, compared.text
    query = "select version from answers join groups on group_number = number where id = :id order by version"
    with create_engine(endpoint.database).connect() as connection:
        versions = connection.execute(sql(query), {"id": compared.json()["id"]}).scalars()
        return ", ".join(map(str, versions))


def test_a_canary_answers_its_share_of_the_conversations_and_whoever_asks_for_it(
    endpoint: Running, other: tuple[Path, str]
) -> None:
    assert raylign(endpoint, "promote", str(other[0]), "--canary", "0.5").returncode == 0
    questions = [f"What is {number} + 2?" for number in range(12)]
    expected = ["2" if canary_answers(question, 2, 0.5) else "1" for question in questions]
    assert {"1", "2"} == set(expected)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda question: version_of(endpoint, question), questions)) == expected
        later = pool.map(lambda question: version_of(endpoint, question, "I guess so.", "Sure?"), questions)
        assert list(later) == expected, "later turns stay with the version of the first"
    assert compared_versions(endpoint, questions[0]) == "1, 2"
    assert one_answer(endpoint, ALIGNED, x_model_version="2") == ("2", other[1])
    assert raylign(endpoint, "rollback").returncode == 0
    assert {version_of(endpoint, question) for question in questions} == {"1"}


def test_a_comparison_in_the_middle_of_a_change_is_answered(endpoint: Running, writer: Path, tmp_path: Path) -> None:
    random_adapter(writer, 2).save_pretrained(tmp_path / "third")
    added = endpoint.ask("POST", "/v1/admin/versions", {"checkpoint": str(tmp_path / "third")}).json()
    Registry(endpoint.folder / ALIGNED).canary(added["number"], 0.5)  # which no replica has heard of
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 2.0}
    compared = endpoint.ask("POST", "/v1/comparisons", body)
    assert compared.status_code == 200, compared.text
    assert raylign(endpoint, "rollback").returncode == 0


def test_a_candidate_is_examined_on_the_endpoint_itself_and_nothing_is_switched(
    endpoint: Running, other: tuple[Path, str], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows([{"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "keywords": ["4"]}] * 2)
    settings = {
        "data": {"path": str(rows), "keep": ["keywords"], "prompt_as": "user_message"},
        "eval_rewards": [{"name": "keywords"}],
        "max_tokens": 8,
        "margins": {"accuracy": 1.0, "reward": 1.0, "max_length_ratio": None, "max_kl": 1000},
    }
    gate = tmp_path / "gate.yaml"
    gate.write_text(yaml.safe_dump(settings))
    examined = raylign(endpoint, "promote", str(other[0]), "--gate", str(gate), "--dry-run")
    assert examined.returncode == 0, examined.stdout + examined.stderr
    assert "accuracy" in examined.stdout and "kl" in examined.stdout
    assert one_answer(endpoint, ALIGNED)[0] == "1"


@pytest.mark.parametrize("damage", ["absent", "cut", "nan", "shape", "base"])
def test_a_checkpoint_that_does_not_fit_is_refused_before_anybody_notices(
    endpoint: Running, writer: Path, other: tuple[Path, str], tmp_path: Path, damage: str
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
        settings.write_text(settings.read_text().replace(str(writer), "somebody/another-model"))
    else:
        tensors = load_file(file)
        name = next(iter(tensors))
        tensors[name] = tensors[name] * float("nan") if damage == "nan" else tensors[name][:, :-1].contiguous()
        save_file(tensors, file)
    before = one_answer(endpoint, ALIGNED)
    refused = raylign(endpoint, "promote", str(folder))
    assert refused.returncode != 0 and "Traceback" not in refused.stderr
    assert one_answer(endpoint, ALIGNED) == before
