"""One real endpoint, started as a user starts it, asked through the real OpenAI client: Ray Serve, vLLM, an adapter."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from peft import PeftModel
from transformers import AutoTokenizer

from alignment.models.folders import BUNDLED
from tests.processes import assert_idle_threads_sleep, descendants, engine_processes
from tests.serving.conftest import ALIGNED, BASE, MAX_TOKENS, WINDOW, Running, holding

QUESTION = "What is the capital of France, and what is it known for?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
TOKENS = 16


@pytest.fixture(scope="session")
def expected(writer: Path, adapted: PeftModel) -> dict[str, str]:
    """What transformers answers, greedily, with and without the adapter."""
    tokenizer = AutoTokenizer.from_pretrained(writer)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def greedy() -> str:
        ids = adapted.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    with adapted.disable_adapter():
        base = greedy()
    return {BASE: base, ALIGNED: greedy()}


def greedy_answer(endpoint: Running, model: str) -> str:
    answer = endpoint.client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_completion_tokens=TOKENS
    )
    return answer.choices[0].message.content or ""


def post(endpoint: Running, body: bytes, path: str = "/v1/chat/completions") -> httpx.Response:
    headers = {"content-type": "application/json", "authorization": f"Bearer {endpoint.keys['user']}"}
    return httpx.post(endpoint.url + path, content=body, headers=headers, timeout=60)


def assert_openai_error(response: Any, status: int) -> None:
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text and "File " not in response.text


def test_while_the_model_loads_the_process_is_healthy_and_not_ready(endpoint: Running) -> None:
    assert endpoint.before == {"/healthz": 200, "/readyz": 503, "/v1/models": 200}


def test_one_line_says_where_it_is_and_how_to_try_it(endpoint: Running) -> None:
    deadline = time.monotonic() + 10
    while not (ready := [line for line in endpoint.output.read_text().splitlines() if line.startswith("Ready")]):
        assert time.monotonic() < deadline, endpoint.output.read_text()
        time.sleep(0.1)
    assert f"{endpoint.url}/v1 serves {ALIGNED} and {BASE}" in ready[0]
    command = ready[0].partition("Try: ")[2].replace("KEY", endpoint.keys["user"])
    answer = subprocess.run(command, shell=True, capture_output=True, timeout=60)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"]


def test_idle_threads_sleep_in_every_process_of_the_endpoint(endpoint: Running) -> None:
    assert_idle_threads_sleep(descendants(of=endpoint.process.pid))
    assert_idle_threads_sleep(engine_processes(of=endpoint.process.pid))


def test_both_models_are_listed_and_the_adapter_names_its_base(endpoint: Running) -> None:
    assert [model.id for model in endpoint.client.models.list()] == [ALIGNED, BASE]
    card = endpoint.client.models.retrieve(ALIGNED).model_dump()
    assert card["parent"] == BASE and card["max_model_len"] == WINDOW


@pytest.mark.parametrize("model", [BASE, ALIGNED])
def test_the_greedy_answer_is_that_of_transformers(endpoint: Running, expected: dict[str, str], model: str) -> None:
    assert greedy_answer(endpoint, model) == expected[model]


def test_the_adapter_answers_differently_from_its_base(expected: dict[str, str]) -> None:
    assert expected[ALIGNED] != expected[BASE]


def test_requests_in_one_batch_get_the_answers_of_their_own_model(endpoint: Running) -> None:
    def scores(model: str) -> list[float]:
        answer = endpoint.client.completions.create(
            model=model, prompt=QUESTION, temperature=0, max_tokens=8, logprobs=0
        )
        assert answer.choices[0].logprobs is not None
        return [score or 0.0 for score in answer.choices[0].logprobs.token_logprobs or []]

    alone = {model: scores(model) for model in (BASE, ALIGNED)}
    names = [BASE, ALIGNED] * 4
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(scores, names))
    for name, found in zip(names, together, strict=True):
        assert found == pytest.approx(alone[name], abs=1e-3), name


def test_a_stream_carries_the_same_answer_in_pieces_and_the_usage(endpoint: Running, expected: dict[str, str]) -> None:
    stream = endpoint.client.chat.completions.create(
        model=ALIGNED,
        messages=MESSAGES,
        temperature=0,
        max_completion_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected[ALIGNED]
    assert len([piece for piece in pieces if piece]) > 4
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == TOKENS


def test_chat_gives_log_probabilities(endpoint: Running) -> None:
    answer = endpoint.client.chat.completions.create(
        model=ALIGNED, messages=MESSAGES, temperature=0, max_completion_tokens=4, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    assert len(tokens) == 4
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in tokens)


def test_completions_continue_a_text(endpoint: Running) -> None:
    answer = endpoint.client.completions.create(
        model=BASE, prompt="The capital of France is", temperature=0, max_tokens=4, logprobs=1, echo=True
    )
    assert answer.choices[0].text.startswith("The capital of France is")
    assert answer.choices[0].logprobs is not None


def test_n_samples_are_n_answers(endpoint: Running) -> None:
    answer = endpoint.client.chat.completions.create(
        model=BASE, messages=MESSAGES, n=3, temperature=1.5, seed=1, max_completion_tokens=12
    )
    assert len({choice.message.content for choice in answer.choices}) == 3


def test_an_unknown_model_is_not_found(endpoint: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'") as refused:
        endpoint.client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert_openai_error(refused.value.response, 404)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"model": ',
        b'{"model": "random-adapter", "temperature": NaN, "messages": []}',
        b'{"model": "random-adapter", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "no model"}]}',
        b'{"model": "random-adapter", "messages": "not a list"}',
        b'{"model": "random-adapter", "messages": [{"role": "user", "content": "hi"}], "max_tokens": -1}',
        b'{"model": "random-adapter", "messages": [{"role": "user", "content": "' + b"long " * 1000 + b'"}]}',
    ],
    ids=["empty", "cut", "nan", "surrogate", "no-model", "no-list", "negative", "longer-than-the-model"],
)
def test_a_bad_body_is_a_clean_400(endpoint: Running, body: bytes) -> None:
    assert_openai_error(post(endpoint, body), 400)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_echo_alone_counts_no_token_of_an_answer(endpoint: Running, stream: bool) -> None:
    body = {"model": ALIGNED, "prompt": "The sky is", "echo": True, "max_tokens": 0, "stream": stream}
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = endpoint.ask("POST", "/v1/completions", body | options)
    assert answer.status_code == 200, answer.text
    last = answer.text.split("data: ")[-2] if stream else answer.text
    usage = json.loads(last)["usage"]
    assert usage["completion_tokens"] == 0 and usage["total_tokens"] == usage["prompt_tokens"] > 0


def test_a_stream_that_cannot_start_is_a_plain_error(endpoint: Running) -> None:
    body = {"model": ALIGNED, "messages": MESSAGES, "stream": True, "max_tokens": -1}
    assert_openai_error(post(endpoint, json.dumps(body).encode()), 400)


def test_too_large_a_body_is_refused_before_it_is_read(endpoint: Running) -> None:
    assert_openai_error(post(endpoint, b"x" * 200_000), 413)


def test_unknown_paths_and_methods_are_refused_in_the_same_form(endpoint: Running) -> None:
    assert_openai_error(endpoint.ask("GET", "/docs"), 404)
    assert_openai_error(endpoint.ask("GET", "/v1/chat/completions"), 405)


def test_no_other_web_page_may_ask(endpoint: Running) -> None:
    answer = endpoint.ask("GET", "/v1/models", origin="https://elsewhere.example")
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_client_that_goes_away_frees_its_place(endpoint: Running) -> None:
    stream = endpoint.client.chat.completions.create(
        model=BASE, messages=MESSAGES, max_completion_tokens=MAX_TOKENS, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    started = time.monotonic()
    greedy_answer(endpoint, BASE)
    assert time.monotonic() - started < 5


def test_no_log_holds_what_people_ask(endpoint: Running) -> None:
    greedy_answer(endpoint, ALIGNED)
    assert not holding(endpoint, QUESTION)


def test_a_second_endpoint_on_the_same_port_is_refused_at_once(endpoint: Running) -> None:
    port = endpoint.url.rpartition(":")[2]
    command = [sys.executable, "-m", "cluster.cli", "serve", BUNDLED, f"port={port}"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert refused.returncode == 1
    assert f"Cannot listen on port {port}" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_who_changes_what_answers_is_written_down(endpoint: Running) -> None:
    assert endpoint.ask("DELETE", "/v1/admin/canary", {}).status_code < 500
    deadline = time.monotonic() + 60
    while True:
        trail = endpoint.ask("GET", "/v1/admin/audit").json()["data"]
        written = [(entry["who"], entry["address"]) for entry in trail if entry["action"] == "end canary"]
        if written:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert set(written) == {("the-admin", "127.0.0.1")}
    assert {entry["detail"]["name"] for entry in trail if entry["action"] == "create key"} >= {"the-user", "the-admin"}
