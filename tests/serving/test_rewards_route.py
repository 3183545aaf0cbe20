"""Implicit rewards of the real service, held against peft; many at once hurt nobody."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from tests.serving.conftest import ALIGNED, Running

TURNS = [{"role": "user", "content": "What is the capital of France?"}]
ANSWERS = ["Paris.", "It is Berlin, I think.", "I do not know."]


def rated(endpoint: Running, *items: dict[str, Any], status: int = 200, role: str = "user", **more: Any) -> Any:
    answer = endpoint.ask("POST", "/v1/rewards", {"items": list(items), **more}, role=role)
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def expected(writer: Path, adapted: PeftModel) -> list[float]:
    """log π - log π_ref (nats) of every answer with its end token, one plain forward pass each."""
    tokenizer = AutoTokenizer.from_pretrained(writer)
    prompt = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)

    def summed(answer: str) -> float:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(f"{prompt}{answer}<|im_end|>")["input_ids"]])
        with torch.no_grad():
            logprobs = adapted(ids).logits[0, :-1].log_softmax(-1)
        return float(logprobs.gather(1, ids[0, 1:, None])[start - 1 :].sum())

    with_adapter = [summed(answer) for answer in ANSWERS]
    with adapted.disable_adapter():
        return [ours - summed(answer) for ours, answer in zip(with_adapter, ANSWERS, strict=True)]


def test_implicit_rewards_are_those_of_peft(endpoint: Running, expected: list[float]) -> None:
    found = rated(endpoint, {"messages": TURNS, "completions": ANSWERS}, beta=0.5)
    assert found["kind"] == "implicit" and found["beta"] == 0.5 and found["version"] == 1
    (item,) = found["items"]
    assert item["logratios"] == pytest.approx(expected, abs=5e-3)
    assert item["rewards"] == pytest.approx([0.5 * value for value in expected], abs=5e-3)
    assert item["winner"] == max(range(3), key=lambda index: expected[index])


def test_rewards_per_token_sum_to_that_of_the_answer(endpoint: Running) -> None:
    found = rated(endpoint, {"messages": TURNS, "completions": ANSWERS}, per_token=True)
    for tokens, total in zip(found["items"][0]["tokens"], found["items"][0]["logratios"], strict=True):
        assert sum(tokens["logratios"]) == pytest.approx(total, abs=1e-4)
        assert len(tokens["tokens"]) == len(tokens["logratios"])


@pytest.mark.slow
def test_many_requests_at_once_get_their_own_answers_and_the_engine_lives(
    endpoint: Running, expected: list[float]
) -> None:
    def one(index: int) -> float:
        item = {"messages": TURNS, "completions": [ANSWERS[index % 3]]}
        return float(rated(endpoint, item)["items"][0]["logratios"][0])

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, range(48)))
    assert found == pytest.approx([expected[index % 3] for index in range(48)], abs=5e-3)
    answer = endpoint.ask("POST", "/v1/chat/completions", {"model": ALIGNED, "messages": TURNS, "max_tokens": 2})
    assert answer.status_code == 200


def test_order_and_batch_do_not_change_a_reward(endpoint: Running) -> None:
    items = [{"prompt": f"{number} and", "completions": [" more", " less text"]} for number in range(20)]
    together = [item["logratios"] for item in rated(endpoint, *items)["items"]]
    alone = [rated(endpoint, item)["items"][0]["logratios"] for item in items[::5]]
    for one, other in zip(alone, together[::5], strict=True):
        assert one == pytest.approx(other, abs=5e-4)


@pytest.mark.parametrize(
    "items",
    [
        [],
        [{"completions": ["x"]}],
        [{"prompt": "x", "messages": TURNS, "completions": ["x"]}],
        [{"prompt": "x", "completions": []}],
        [{"prompt": "x", "completions": ["y"] * 257}],
        [{"prompt": "x", "completions": ["word " * 600]}],
        [{"messages": [{"role": "god", "content": "x"}], "completions": ["y"]}],
    ],
    ids=["nothing", "no-prompt", "two-prompts", "no-answers", "too-many", "too-long", "no-role"],
)
def test_what_cannot_be_rated_is_a_clean_400(endpoint: Running, items: list[Any]) -> None:
    assert rated(endpoint, *items, status=400)["error"]["type"] == "invalid_request_error"


def test_only_those_choose_a_version_who_may(endpoint: Running) -> None:
    item = {"prompt": "x", "completions": ["y"]}
    rated(endpoint, item, version=1, status=403)
    assert rated(endpoint, item, version=1, role="labeller")["version"] == 1
    for role in ("labeller", "admin"):
        rated(endpoint, item, version=99, role=role, status=409)
