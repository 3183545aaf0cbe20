"""Other whole weights behind the same endpoint: under load, after a crash, and how an endpoint ends."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.processes import descendants, engine_processes
from tests.serving.conftest import SMALL, SMALL_TOKENS, Running, holding
from tests.serving.test_swap import TOKENS, TURNS, load, one_answer, raylign


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Whole weights, and what transformers says that they answer greedily."""

    folder: Path
    logprobs: list[float]
    """log π (nats) of every token of the answer."""


def greedy_logprobs(folder: Path) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"do_sample": False, "max_new_tokens": SMALL_TOKENS, "output_scores": True}
    drawn = model.generate(**inputs, **settings, return_dict_in_generate=True)
    return [scores.log_softmax(-1).max().item() for scores in drawn.scores]


def answered_logprobs(endpoint: Running) -> list[float]:
    body = {"model": SMALL, "messages": TURNS, "temperature": 0, "logprobs": True}
    answer = endpoint.ask("POST", "/v1/chat/completions", body).json()
    return [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]


@pytest.fixture(scope="module")
def first(tiny_model: Path) -> Whole:
    """What the small endpoint begins with."""
    return Whole(folder=tiny_model, logprobs=greedy_logprobs(tiny_model))


@pytest.fixture(scope="module")
def second(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Other weights of the same shape."""
    folder = tmp_path_factory.mktemp("second") / "second"
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * weight.std() * torch.randn_like(weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return Whole(folder=folder, logprobs=greedy_logprobs(folder))


def test_whole_weights_are_swapped_under_load(small_endpoint: Running, first: Whole, second: Whole) -> None:
    begun = raylign(small_endpoint, "promote", "1")  # other tests may have left another version
    assert begun.returncode == 0, begun.stdout + begun.stderr
    number, before = one_answer(small_endpoint, SMALL)
    assert answered_logprobs(small_endpoint) == pytest.approx(first.logprobs, abs=1e-3)
    with load(small_endpoint, SMALL) as seen:
        time.sleep(1)
        promoted = raylign(small_endpoint, "promote", str(second.folder))
        assert promoted.returncode == 0, promoted.stdout + promoted.stderr
        version, after = one_answer(small_endpoint, SMALL)
        time.sleep(1)
    assert not seen.failed
    assert before != after and number == "1" != version
    assert seen.answers == {number: {before}, version: {after}}
    assert answered_logprobs(small_endpoint) == pytest.approx(second.logprobs, abs=1e-3)


def test_a_restarted_replica_has_the_current_version(small_endpoint: Running, second: Whole) -> None:
    version, text = one_answer(small_endpoint, SMALL)
    (engine,) = engine_processes(of=small_endpoint.process.pid)
    engine.kill()
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        body = {"model": SMALL, "messages": TURNS, "max_tokens": TOKENS, "temperature": 0}
        answer = small_endpoint.ask("POST", "/v1/chat/completions", body)
        if answer.status_code == 200:
            break
        assert answer.status_code == 503, answer.text
        time.sleep(1)
    assert one_answer(small_endpoint, SMALL) == (version, text)
    assert answered_logprobs(small_endpoint) == pytest.approx(second.logprobs, abs=1e-3)


@pytest.mark.slow  # Ray Serve takes its time to try again
def test_a_replica_does_not_answer_with_files_that_have_changed(small_endpoint: Running) -> None:
    version, text = one_answer(small_endpoint, SMALL)
    (file,) = small_endpoint.folder.glob(f"**/versions/{int(version):05d}/tokenizer_config.json")
    content = file.read_bytes()
    file.write_bytes(content + b"\n")  # which harms nothing but the hash
    try:
        (engine,) = engine_processes(of=small_endpoint.process.pid)
        engine.kill()
        deadline = time.monotonic() + 240
        while not holding(small_endpoint, "is damaged: tokenizer_config.json"):
            body = {"model": SMALL, "messages": TURNS, "max_tokens": TOKENS, "temperature": 0}
            with suppress(httpx.TimeoutException):
                asked = httpx.post(
                    f"{small_endpoint.url}/v1/chat/completions",
                    json=body,
                    headers={"authorization": f"Bearer {small_endpoint.keys['user']}"},
                    timeout=5,
                )
                assert asked.status_code == 503, asked.text
            assert time.monotonic() < deadline
    finally:
        file.write_bytes(content)
    body = {"model": SMALL, "messages": TURNS, "max_tokens": TOKENS, "temperature": 0}
    while (answer := small_endpoint.ask("POST", "/v1/chat/completions", body)).status_code != 200:
        assert time.monotonic() < deadline + 240, answer.text
        time.sleep(1)
    assert one_answer(small_endpoint, SMALL) == (version, text)


def test_it_stops_on_a_signal_and_leaves_no_process(small_endpoint: Running) -> None:
    family = descendants(of=small_endpoint.process.pid)
    assert len(family) > 5
    small_endpoint.process.send_signal(signal.SIGINT)
    assert small_endpoint.process.wait(120) == 0
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert small_endpoint.output.read_text().splitlines()[-1] == "Stopped."
