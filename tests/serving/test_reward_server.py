"""The reward server gives a run the rewards that the model would give in its own process, and nothing to strangers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.responses import Response

from alignment.errors import ConfigError, RewardError
from alignment.groups import Completion, Group, Message
from alignment.rewards import Rewards
from alignment.rewards.remote import ScoreItem
from alignment.settings.plugins import scorer_class
from serving.launch import refuse_busy_port
from serving.reward_server import KeyMiddleware, ModelThread, reward_server
from serving.schema import RequestError
from tests.alignment.test_rewards_model import GROUPS, make_reward_model
from tests.conftest import free_port
from tests.processes import without_wait_policy

KEY = "a-key-of-this-test"
HEADERS = {"Authorization": f"Bearer {KEY}"}
PRIVATE = "paris lyon capital"
FOR_THE_TEST = {"CUDA_VISIBLE_DEVICES": "", "OMP_DISPLAY_ENV": "true"}
COMMAND = [sys.executable, "-m", "cluster.cli", "reward-server"]


@dataclass(frozen=True, kw_only=True)
class Running:
    url: str
    model: Path
    log: Path
    process: subprocess.Popen[bytes]

    def post(self, body: Any, **settings: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(f"{self.url}/score", content=content, timeout=60, **{"headers": HEADERS, **settings})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    model, log, port = make_reward_model(folder / "reward_model"), folder / "log", free_port()
    options = ["--port", str(port), "--dtype", "fp32", "--max-body-mib", "0.05", "--max-items", "50"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*COMMAND, str(model), *options],
            stdout=file,
            stderr=file,
            env={
                **without_wait_policy(),
                "RAYLIGN_REWARD_KEY": KEY,
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_DISPLAY_ENV": "true",
            },
        )
    running = Running(url=f"http://127.0.0.1:{port}", model=model, log=log, process=process)
    try:
        wait_until_ready(running)
        yield running
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_until_ready(running: Running) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert running.process.poll() is None, running.log.read_text()
        try:
            if httpx.get(f"{running.url}/healthz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(running.log.read_text())


def rewards_of(**settings: Any) -> Rewards:
    return Rewards((scorer_class(settings["name"]).model_validate(settings),), torch.device("cpu"))


def given(groups: list[Group]) -> list[list[float | None]]:
    return [[completion.reward for completion in group.completions] for group in groups]


def items(*texts: str, prompt: str = "what is") -> dict[str, Any]:
    return {"items": [{"id": str(i), "prompt": prompt, "completion": text} for i, text in enumerate(texts)]}


def test_a_run_gets_the_same_rewards_over_http_as_in_its_own_process(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_THE_RUN", KEY)
    remote = rewards_of(name="http", url=f"{server.url}/score", key_env="KEY_OF_THE_RUN", batch_size=2)
    local = rewards_of(name="model", path=str(server.model), dtype="fp32")
    plain = Group(id="plain", prompt="what is", completions=(Completion(text=" the capital"),), columns={"answer": 4})
    system = (Message(role="system", content="so"), Message(role="user", content="is it"))
    groups = [*GROUPS, plain, Group(id="system", prompt=system, completions=(Completion(text="very"),))]
    for one, other in zip(given(remote.score(groups)), given(local.score(groups)), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    remote.close()


def test_its_idle_threads_sleep(server: Running) -> None:
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in server.log.read_text()


def test_concurrent_requests_get_their_own_answers(server: Running) -> None:
    texts = ["".join([" paris", " lyon", " so", " it"][k % 4] for k in range(i, i + 1 + i % 3)) for i in range(24)]

    async def ask_all() -> list[float]:
        async with httpx.AsyncClient(headers=HEADERS, timeout=60) as client:
            asked = [client.post(f"{server.url}/score", json=items(text)) for text in texts]
            return [reply.json()["items"][0]["reward"] for reply in await asyncio.gather(*asked)]

    together = asyncio.run(ask_all())
    alone = [server.post(items(text)).json()["items"][0]["reward"] for text in texts]
    assert together == pytest.approx(alone, abs=1e-4)
    assert len(set(texts)) == len({round(reward, 4) for reward in alone}) == 12


def test_an_item_that_cannot_be_rated_fails_alone_with_a_code(server: Running) -> None:
    reply = server.post(items(" paris", " so" * 80, " lyon"))
    assert reply.status_code == 200
    first, second, third = reply.json()["items"]
    assert second == {"id": "1", "error": "too_long"}
    assert isinstance(first["reward"], float) and isinstance(third["reward"], float)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": KEY},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Basic {KEY}"},
        {"X-Api-Key": KEY},
        [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer x")],
    ],
)
def test_without_the_one_right_key_nothing_is_rated(server: Running, headers: Any) -> None:
    reply = server.post(items("paris"), headers=headers)
    assert reply.status_code == 401
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert reply.json()["error"]["code"] == "invalid_api_key"


def test_the_case_of_the_scheme_means_nothing(server: Running) -> None:
    assert server.post(items("paris"), headers={"Authorization": f"bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/score", "/score/", "/docs", "/openapi.json", "/metrics", "/healthz/", "//healthz"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_only_the_health_check_is_public(server: Running, path: str, method: str) -> None:
    assert httpx.request(method, server.url + path, timeout=10).status_code == 401


def test_with_the_key_unknown_paths_and_methods_are_refused_in_one_form(server: Running) -> None:
    assert httpx.get(f"{server.url}/nothing", headers=HEADERS).json()["error"]["code"] == "not_found"
    assert httpx.get(f"{server.url}/score", headers=HEADERS).json()["error"]["type"] == "invalid_request_error"
    for path in ("/docs", "/openapi.json"):
        assert httpx.get(server.url + path, headers=HEADERS).status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"items": NaN}',
        b"[" * 5000,
        {"items": []},
        {"items": [{}]},
        {"items": [{"id": "1", "completion": "a"}]},
        {"items": [{"id": "1", "prompt": "p", "messages": [{"role": "user", "content": "a"}], "completion": "a"}]},
        {"items": [{"id": "1", "messages": [], "completion": "a"}]},
        {"items": [{"id": 1, "prompt": "p", "completion": "a"}]},
        {"items": [{"id": "1", "prompt": "p", "completion": 3}]},
        {"items": [{"id": "1", "prompt": "p", "completion": "a\ud800"}]},
        {"items": [{"id": "1", "prompt": "p", "completion": "a", "x" * 20_000: 1}]},
        {"items": [{"id": "1", "prompt": "p", "completion": "a"}] * 2},
        {**items("a"), "model": "m"},
        items(*["a"] * 51),
    ],
)
def test_a_bad_body_is_a_small_400(server: Running, body: Any) -> None:
    reply = server.post(body)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert len(reply.content) < 2000


def test_too_large_a_body_is_refused_with_or_without_a_length(server: Running) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(200):
            yield b"x" * 1000

    assert server.post(b" " * 60_000).status_code == 413
    with contextlib.suppress(httpx.TransportError):  # it may hang up while we are still sending
        assert httpx.post(f"{server.url}/score", content=endless(), headers=HEADERS, timeout=30).status_code == 413
    assert server.post(items("paris")).status_code == 200


def test_no_log_and_no_refusal_holds_what_was_asked(server: Running) -> None:
    for body in (
        items(PRIVATE),
        {"items": [{"id": "1", "prompt": 3, "completion": PRIVATE}]},
        items(PRIVATE + " so" * 80),
    ):
        assert PRIVATE not in server.post(body).text
    log = server.log.read_text()
    assert PRIVATE not in log and KEY not in log
    assert "Ready after" in log


class Slow:
    """A scorer that waits for leave, and notes what it was asked together."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.leave = threading.Event()

    def score(self, groups: list[Group]) -> list[list[float]]:
        self.asked.append(sum(len(group.completions) for group in groups))
        assert self.leave.wait(30)
        texts = [[completion.text for completion in group.completions] for group in groups]
        if any("boom" in text for each in texts for text in each):
            raise RuntimeError("out of memory")
        if any("bad" in text for each in texts for text in each):
            raise RewardError("bad")
        return [[float("nan") if text == "nan" else float(len(text)) for text in each] for each in texts]

    def close(self) -> None: ...


def item(text: str, prompt: str = "p") -> ScoreItem:
    return ScoreItem(id=text, prompt=prompt, completion=text)


def test_what_arrives_while_the_model_works_is_rated_together() -> None:
    scorer = Slow()
    thread = ModelThread(scorer, max_waiting=100)
    first = thread.submit([item("a")])
    while not scorer.asked:
        time.sleep(0.01)
    others = [thread.submit([item("b" * i, prompt=str(i)), item("c" * i, prompt=str(i))]) for i in range(1, 5)]
    scorer.leave.set()
    assert [answer.reward for answer in first[0].result(30)] == [1.0]
    assert [[answer.reward for answer in each[0].result(30)] for each in others] == [[i, i] for i in range(1, 5)]
    assert scorer.asked == [1, 8]


def test_too_many_waiting_completions_are_refused_until_some_are_done() -> None:
    scorer = Slow()
    thread = ModelThread(scorer, max_waiting=3)
    first = thread.submit([item("a"), item("bb")])
    with pytest.raises(RequestError) as caught:
        thread.submit([item("a"), item("bb")])
    assert caught.value.reply.status == 503
    scorer.leave.set()
    first[0].result(30)
    deadline = time.monotonic() + 10
    while True:
        try:
            large = thread.submit([item("x" * i) for i in range(1, 6)])
            break
        except RequestError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert len(large[0].result(30)) == 5, "alone, a request larger than the limit is served"


def test_a_failing_model_fails_items_and_not_the_thread() -> None:
    scorer = Slow()
    scorer.leave.set()
    thread = ModelThread(scorer, max_waiting=100)
    (together,) = thread.submit([item("a"), item("bad"), item("ccc")])
    assert [(answer.reward, answer.error) for answer in together.result(30)] == [
        (1.0, None),
        (None, "not_scorable"),
        (3.0, None),
    ]
    (boom,) = thread.submit([item("boom")])
    assert [answer.error for answer in boom.result(30)] == ["model_failed"]
    (nan,) = thread.submit([item("nan")])
    assert [answer.error for answer in nan.result(30)] == ["not_finite"]
    assert thread.is_alive


def test_without_a_key_it_starts_only_for_this_machine_and_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYLIGN_REWARD_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"RAYLIGN_REWARD_KEY must hold a key .*; or give --no-key"):
        reward_server(str(tmp_path))
    monkeypatch.setenv("RAYLIGN_REWARD_KEY", "  ")
    with pytest.raises(ConfigError, match="RAYLIGN_REWARD_KEY must hold a key"):
        reward_server(str(tmp_path))
    for host in ("0.0.0.0", "::", "localhost"):
        with pytest.raises(ConfigError, match=f"--no-key is for --host 127.0.0.1; on {host} every machine"):
            reward_server(str(tmp_path), host=host, no_key=True)


def test_a_wrong_model_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    command = [*COMMAND, str(tmp_path / "nothing"), "--no-key", "--port", str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("ModelError: model folder ")


def test_it_serves_without_a_key_when_asked_and_stops_on_a_signal(server: Running, tmp_path: Path) -> None:
    port = free_port()
    with (tmp_path / "log").open("wb") as file:
        process = subprocess.Popen(
            [*COMMAND, str(server.model), "--no-key", "--port", str(port)], stdout=file, stderr=file
        )
    running = Running(url=f"http://127.0.0.1:{port}", model=server.model, log=tmp_path / "log", process=process)
    try:
        wait_until_ready(running)
        assert httpx.post(f"{running.url}/score", json=items("paris"), timeout=30).status_code == 200
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
    finally:
        process.kill()
        process.wait()
    refuse_busy_port("127.0.0.1", port)
    assert "Traceback" not in running.log.read_text()


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8100", "origin": "http://evil.example:8100"},
        {"host": "127.0.0.1", "origin": "http://evil.example"},
        {"host": "127.0.0.1", "sec-fetch-site": "cross-site"},
    ],
)
def test_without_a_key_no_page_that_a_browser_shows_is_answered(headers: dict[str, str]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Response("rated")(scope, receive, send)

    async def asked(sent: dict[str, str]) -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(KeyMiddleware(app, None)), base_url="http://127.0.0.1"
        ) as client:
            return await client.post("/score", json={}, headers=sent)

    refused = asyncio.run(asked(headers))
    assert refused.status_code == 403 and "cors_origins" not in refused.text  # which it has not
    assert asyncio.run(asked({})).status_code == 200
