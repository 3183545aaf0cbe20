"""Other whole weights behind the same endpoint: under load, after a crash, and how an endpoint ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from serving.replica.routing import canary_answers
from tests.processes import descendants, engine_processes
from tests.serving.conftest import SMALL, SMALL_TOKENS, Running, holding
from tests.serving.test_swap import TOKENS, TURNS, load, one_answer, raylign, version_of


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


def answered_logprobs(endpoint: Running, model: str = SMALL) -> list[float]:
    body = {"model": model, "messages": TURNS, "temperature": 0, "logprobs": True}
    answer = endpoint.ask("POST", "/v1/chat/completions", body).json()
    return [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]


@pytest.fixture(scope="module")
def first(writer: Path) -> Whole:
    """What the small endpoint begins with."""
    return Whole(folder=writer, logprobs=greedy_logprobs(writer))


@pytest.fixture(scope="module")
def second(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Other weights of the same shape."""
    return other_weights(writer, tmp_path_factory.mktemp("second") / "second")


def other_weights(model_folder: Path, folder: Path) -> Whole:
    """Writes a model of the same shape with other weights."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * weight.std() * torch.randn_like(weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
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


def test_whole_weights_that_overflow_are_refused_and_spoil_nothing(small_endpoint: Running, tmp_path: Path) -> None:
    begun = raylign(small_endpoint, "promote", "1")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    before = one_answer(small_endpoint, SMALL)
    folder = overflowing(small_endpoint, tmp_path / "overflowing")
    promoted = raylign(small_endpoint, "promote", str(folder))
    assert promoted.returncode == 1 and "log-probabilities are not finite" in promoted.stderr, promoted.stderr
    assert one_answer(small_endpoint, SMALL) == before
    assert small_endpoint.ask("GET", "/readyz").status_code == 200
    for number in range(20):
        body = {"model": SMALL, "prompt": f"Lake {number} has", "max_tokens": 4, "temperature": 0, "logprobs": 1}
        answer = small_endpoint.ask("POST", "/v1/completions", body).json()
        assert None not in answer["choices"][0]["logprobs"]["token_logprobs"], number


def overflowing(endpoint: Running, folder: Path) -> Path:
    """The first version with finite weights in one layer whose products are not."""
    (model_folder,) = endpoint.folder.glob("**/versions/00001")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(1e38)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


@pytest.mark.slow  # another engine starts
def test_a_gate_and_a_canary_have_a_replica_of_their_own(
    small_endpoint: Running, second: Whole, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    begun = raylign(small_endpoint, "promote", "1")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    rows = write_rows([{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}] * 2)
    settings = {
        "data": {"path": str(rows), "prompt_as": "user_message"},
        "max_tokens": SMALL_TOKENS,
        "margins": {"accuracy": 1.0, "max_length_ratio": None},
    }
    gate = tmp_path / "gate.yaml"
    gate.write_text(yaml.safe_dump(settings))
    before = one_answer(small_endpoint, SMALL)
    with load(small_endpoint, SMALL, clients=2) as seen:
        examined = raylign(small_endpoint, "promote", str(second.folder), "--gate", str(gate), "--canary", "0.5")
        assert examined.returncode == 0, examined.stdout + examined.stderr
    assert "accuracy" in examined.stdout and not seen.failed
    state = small_endpoint.ask("GET", "/v1/admin/versions").json()["state"]
    number, share = state["canary"], state["share"]
    assert (state["current"], share) == (1, 0.5)
    for question in (f"What is {number} + 2?" for number in range(10)):
        expected = str(number) if canary_answers(question, number, share) else "1"
        assert {version_of(small_endpoint, question, model=SMALL) for _ in range(2)} == {expected}
    assert one_answer(small_endpoint, SMALL, x_model_version="1") == before
    assert one_answer(small_endpoint, SMALL, x_model_version=str(number))[0] == str(number)
    assert raylign(small_endpoint, "promote", str(number)).returncode == 0
    assert one_answer(small_endpoint, SMALL)[0] == str(number)
    assert answered_logprobs(small_endpoint) == pytest.approx(second.logprobs, abs=1e-3)
    deadline = time.monotonic() + 120
    while len(engine_processes(of=small_endpoint.process.pid)) > 1:
        assert time.monotonic() < deadline, "the trial has ended, and its engine has not"
        time.sleep(0.5)


@pytest.mark.slow  # an engine starts again
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
