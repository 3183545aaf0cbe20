"""The whole circle with the real model: train, serve, ask people, train on what they said, gate, promote."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.rewards.rules import contains_keyword
from cluster.config import load_run
from cluster.demo import read_questions
from cluster.launch import run
from serving.registry.promote import promote, rollback
from tests.serving.conftest import SMALL, Running, started

TOKENS = 96
"""Most of an answer: enough for most to come to their end, so that the shorter one is known."""
ABOUT_AS_LONG = 1.15
"""Up to this ratio of their characters two right answers are a tie."""
TRAINING = Path("configs/data/short_answers.train.jsonl")
HELD_OUT = Path("configs/data/short_answers.eval.jsonl")
NUM_JUDGED = 40
NUM_ASKED = 12
LORA = {"rank": 8, "alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def raylign(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def recipe(folder: Path, name: str, **more: Any) -> str:
    config = {
        "name": name,
        "output": str(folder),
        "algorithm": {"name": "dpo", "beta": 0.2},
        "groups_per_step": 8,
        "optim": {"lr": 3e-4, "schedule": "constant", "micro_batch_tokens": 2048},
        "evaluate": {"every": 0, "samples": 0},
        **more,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)


def turns(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def answers_to(endpoint: Running, number: int, question: dict[str, Any]) -> dict[str, str]:
    """Two answers by their ids, the same ones in every run of this test."""
    body = {"model": "circle", "messages": turns(question["prompt"]), "max_tokens": TOKENS}
    drawn = endpoint.ask("POST", "/v1/chat/completions", {**body, "temperature": 1.0, "n": 2, "seed": number}).json()
    return {f"{drawn['id']}-{choice['index']}": choice["message"]["content"] for choice in drawn["choices"]}


def judged(endpoint: Running, question: dict[str, Any], answers: dict[str, str]) -> None:
    """A person who wants a right answer, and the shorter one of two; then writes how it should have been."""

    def say(**verdict: Any) -> None:
        said = endpoint.ask("POST", "/v1/feedback", verdict, role="labeller")
        assert said.status_code == 200, said.text

    order = ranking(answers, question["keywords"])
    if order:
        say(kind="ranking", id=order[0].rpartition("-")[0], order=order)
    say(kind="correction", id=next(iter(answers)), text=question["chosen"])


def ranking(answers: dict[str, str], keywords: list[str]) -> list[str]:
    """The ids of two answers, the better one first; empty if neither is."""
    right = sorted((id for id in answers if contains_keyword(answers[id], keywords)), key=lambda id: len(answers[id]))
    if not right or (len(right) == 2 and len(answers[right[1]]) <= ABOUT_AS_LONG * len(answers[right[0]])):
        return []
    return [right[0], *(id for id in answers if id != right[0])]


def lengths(endpoint: Running) -> float:
    """Mean tokens of greedy answers to prompts that nobody judged."""

    def one(question: dict[str, Any]) -> int:
        body = {"model": "circle", "messages": turns(question["prompt"]), "max_tokens": TOKENS, "temperature": 0}
        return int(endpoint.ask("POST", "/v1/chat/completions", body).json()["usage"]["completion_tokens"])

    with ThreadPoolExecutor(8) as pool:
        return statistics.fmean(pool.map(one, read_questions(HELD_OUT)[:NUM_ASKED]))


def test_what_people_choose_trains_the_version_that_answers_next(
    small_endpoint: Running, writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same circle on random weights, which have nothing to say: what goes round is asked here, not what for."""
    for question in read_questions(TRAINING)[:4]:
        body = {"messages": turns(question["prompt"]), "temperature": 1.5}
        asked = small_endpoint.ask("POST", "/v1/comparisons", body, role="labeller").json()
        verdict = {"kind": "choice", "id": asked["id"], "winner": asked["answers"][0]["id"]}
        assert small_endpoint.ask("POST", "/v1/feedback", verdict, role="labeller").status_code == 200
    monkeypatch.setenv("RAYLIGN_KEY", small_endpoint.keys["admin"])
    data = {"path": f"{small_endpoint.url}/v1/feedback/export", "max_length": 256}
    file = recipe(tmp_path, "small", steps=2, groups_per_step=2, model={"path": str(writer)}, data=data)
    run(load_run(Path(file), []))
    promote(str(tmp_path / "small"), url=small_endpoint.url)
    listing = small_endpoint.ask("GET", "/v1/admin/versions").json()
    assert (listing["state"]["current"], listing["state"]["previous"]) == (2, 1)
    assert listing["versions"][1]["parent"] == 1 and listing["versions"][1]["data"]
    chat = {"model": SMALL, "messages": turns("And now?"), "max_tokens": 2}
    assert small_endpoint.ask("POST", "/v1/chat/completions", chat).headers["x-model-version"] == "2"
    rollback(url=small_endpoint.url)


@pytest.mark.slow  # minutes of training
@pytest.mark.timeout(1800)
def test_what_people_prefer_changes_what_is_served(tmp_path: Path) -> None:
    first = recipe(
        tmp_path,
        "first",
        steps=2,
        model={"lora": LORA},
        data={"path": str(TRAINING), "prompt_as": "user_message", "max_length": 256},
    )
    raylign("train", first)
    settings = ("name=circle", "max_model_len=512", "feedback.record=true", "rewards.max_length=512")
    with started(tmp_path / "first", tmp_path, *settings) as endpoint:
        before = lengths(endpoint)
        questions = read_questions(TRAINING)[:NUM_JUDGED]
        with ThreadPoolExecutor(8) as pool:
            drawn = list(pool.map(lambda number: answers_to(endpoint, number, questions[number]), range(NUM_JUDGED)))
        for question, answers in zip(questions, drawn, strict=True):  # in one order, which training keeps
            judged(endpoint, question, answers)
        second = recipe(
            tmp_path,
            "second",
            steps=8,
            model={"lora": {**LORA, "start": str(tmp_path / "first")}},
            data={"path": f"{endpoint.url}/v1/feedback/export", "max_length": 256},
        )
        key = {"RAYLIGN_KEY": endpoint.keys["admin"]}
        raylign("train", second, **key)
        gate = tmp_path / "gate.yaml"
        held_out = {"path": str(HELD_OUT), "prompt_as": "user_message", "keep": ["keywords"]}
        gate.write_text(
            yaml.safe_dump(
                {
                    "data": held_out,
                    "num_prompts": 6,
                    "eval_rewards": [{"name": "keywords"}],
                    "max_tokens": TOKENS,
                    "margins": {"accuracy": 0.5, "reward": 0.5, "max_length_ratio": 1.0, "max_kl": 100},
                }
            )
        )
        told = raylign("promote", str(tmp_path / "second"), "--gate", str(gate), "--url", endpoint.url, **key)
        assert "accuracy" in told and "length" in told
        state = endpoint.ask("GET", "/v1/admin/versions").json()
        assert state["state"]["current"] == 2
        assert state["versions"][1]["parent"] == 1 and state["versions"][1]["data"]
        after = lengths(endpoint)
    print(f"tokens of an answer: {before:g} before, {after:g} after")
    assert after < 0.85 * before, (before, after)
