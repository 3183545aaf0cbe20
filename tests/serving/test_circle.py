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

from alignment.demo import read_questions
from alignment.rewards.rules import contains_keyword
from tests.serving.conftest import Running, started

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
    command = [sys.executable, "-m", "alignment.cli", *arguments]
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


def judged(endpoint: Running, question: dict[str, Any]) -> None:
    """A person who wants a right answer, and the shorter one of two; then writes how it should have been."""

    def say(**verdict: Any) -> None:
        said = endpoint.ask("POST", "/v1/feedback", verdict, role="labeller")
        assert said.status_code == 200, said.text

    body = {"messages": turns(question["prompt"]), "max_tokens": TOKENS, "temperature": 1.0}
    asked = endpoint.ask("POST", "/v1/comparisons", body, role="labeller").json()
    say(kind="choice", id=asked["id"], winner=winner(asked["answers"], question["keywords"]))
    say(kind="correction", id=asked["answers"][0]["id"], text=question["chosen"])


def winner(answers: list[dict[str, str]], keywords: list[str]) -> str:
    right = [answer for answer in answers if contains_keyword(answer["text"], keywords)]
    right.sort(key=lambda answer: len(answer["text"]))
    if not right:
        return "both_bad"
    tie = len(right) == 2 and len(right[1]["text"]) <= ABOUT_AS_LONG * len(right[0]["text"])
    return "tie" if tie else right[0]["id"]


def lengths(endpoint: Running) -> float:
    """Mean tokens of greedy answers to prompts that nobody judged."""

    def one(question: dict[str, Any]) -> int:
        body = {"model": "circle", "messages": turns(question["prompt"]), "max_tokens": TOKENS, "temperature": 0}
        return int(endpoint.ask("POST", "/v1/chat/completions", body).json()["usage"]["completion_tokens"])

    with ThreadPoolExecutor(8) as pool:
        return statistics.fmean(pool.map(one, read_questions(HELD_OUT)[:NUM_ASKED]))


@pytest.mark.timeout(1200)
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
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda question: judged(endpoint, question), read_questions(TRAINING)[:NUM_JUDGED]))
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
                    "prompts": 6,
                    "judges": [{"name": "keywords"}],
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
