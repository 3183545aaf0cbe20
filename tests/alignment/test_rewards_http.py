"""A reward service that fails, is late or talks nonsense is asked again, item by item, and never trusted."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from alignment.errors import ConfigError, RewardError
from alignment.groups import Completion, Group, Message
from alignment.rewards import Rewards
from alignment.settings.plugins import scorer_class
from tests.conftest import free_port

SECRET, PROMPT, ANSWER = "sk-very-secret", "a private question", "a private answer"
Reaction = Callable[[list[dict[str, Any]]], Any]


def length(item: dict[str, Any]) -> dict[str, Any]:
    return {"id": item["id"], "reward": len(item["completion"])}


def sound(items: list[dict[str, Any]]) -> Any:
    return {"items": [length(item) for item in items]}


class Service:
    """A real HTTP server that reacts to requests as told, and soundly once nothing is told any more."""

    def __init__(self) -> None:
        self.reactions: list[Reaction] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def asked(self) -> list[list[str]]:
        """The completions of each request."""
        return [[item["completion"] for item in request["items"]] for request in self.requests]

    def react(self, body: dict[str, Any], headers: Any) -> Any:
        with self.lock:
            self.requests.append(body)
            self.headers.append(headers)
            reaction = self.reactions.pop(0) if self.reactions else sound
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return reaction(body["items"])
        finally:
            with self.lock:
                self.at_once -= 1

    @contextmanager
    def listening(self) -> Iterator[str]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = service.react(body, self.headers)
                if answer is None:  # hang up
                    return
                status, data = answer if isinstance(answer, tuple) else (200, answer)
                text = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None: ...

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}/score"
            server.shutdown()


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with service.listening() as url:
        yield url


@contextmanager
def asking(url: str, **settings: Any) -> Iterator[Rewards]:
    settings = {"name": "http", "url": url, "backoff_s": 0.01, **settings}
    rewards = Rewards((scorer_class("http").model_validate(settings),), torch.device("cpu"))
    try:
        yield rewards
    finally:
        rewards.close()


def group(*texts: str, name: str = "rows:7", prompt: Any = PROMPT, **columns: Any) -> Group:
    return Group(id=name, prompt=prompt, completions=tuple(Completion(text=text) for text in texts), columns=columns)


def given(groups: list[Group]) -> list[list[float | None]]:
    return [[completion.reward for completion in each.completions] for each in groups]


GROUPS = [group("a", "bb", name="1"), group("ccc", name="2", answer=4)]


def test_the_request_has_everything_and_the_answer_may_come_in_any_order(service: Service, url: str) -> None:
    turns = (Message(role="system", content="s"), Message(role="user", content="u"))
    service.reactions.append(lambda items: {"items": [length(item) for item in reversed(items)], "model": "m"})
    with asking(url) as rewards:
        assert given(rewards.score([GROUPS[0], group("ccc", prompt=turns, answer=[4, None])])) == [[1, 2], [3]]
    (request,) = service.requests
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert request == {
        "items": [
            {"id": "0", "prompt": PROMPT, "completion": "a", "columns": {}},
            {"id": "1", "prompt": PROMPT, "completion": "bb", "columns": {}},
            {"id": "2", "messages": messages, "completion": "ccc", "columns": {"answer": [4, None]}},
        ]
    }
    assert "Authorization" not in service.headers[0]


def test_the_key_comes_from_the_environment_and_goes_into_the_header(
    service: Service, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", SECRET + "\n")
    with asking(url, key_env="MY_KEY") as rewards:
        rewards.score(GROUPS)
    assert service.headers[0]["Authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "tab\tbed", "schlüssel"])
def test_a_key_that_is_not_there_or_no_header_is_refused_unquoted(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ConfigError) as caught, asking("http://127.0.0.1:1/", key_env="MY_KEY"):
        pass
    assert str(caught.value) == "the environment variable MY_KEY must hold a key of visible ASCII characters"


def test_items_go_in_batches_with_bounded_concurrency(service: Service, url: str) -> None:
    def slow(items: list[dict[str, Any]]) -> Any:
        time.sleep(0.05)
        return sound(items)

    service.reactions.extend([slow] * 20)
    groups = [group(*("x" * (1 + i % 5) for i in range(4)), name=str(n)) for n in range(10)]
    with asking(url, batch_size=3, concurrency=2) as rewards:
        assert given(rewards.score(groups)) == [[1, 2, 3, 4]] * 10
    assert sorted(map(len, service.asked)) == [1, *[3] * 13]
    assert service.most_at_once == 2


@pytest.mark.parametrize(
    "reaction",
    [
        lambda items: {"items": [length(items[0]), length(items[2])]},
        lambda items: {"items": [length(items[0]), {"id": items[1]["id"], "reward": math.nan}, length(items[2])]},
        lambda items: {"items": [length(items[0]), {"id": items[1]["id"], "reward": math.inf}, length(items[2])]},
        lambda items: {"items": [length(items[0]), {"id": items[1]["id"], "reward": 10**400}, length(items[2])]},
        lambda items: {"items": [length(items[0]), {"id": items[1]["id"]}, length(items[2])]},
        lambda items: {"items": [length(items[0]), {"id": items[1]["id"], "error": "busy"}, length(items[2])]},
        lambda items: {"items": [*map(length, items), length(items[1])]},
        lambda items: {"items": [length(items[0]), {"id": "other", "reward": 1}, length(items[2])]},
    ],
    ids=["left out", "nan", "infinite", "huge", "no reward", "error", "twice", "another id"],
)
def test_only_the_item_that_failed_is_asked_about_again(service: Service, url: str, reaction: Reaction) -> None:
    service.reactions.append(reaction)
    with asking(url) as rewards:
        assert given(rewards.score(GROUPS)) == [[1, 2], [3]]
    assert service.asked == [["a", "bb", "ccc"], ["bb"]]


def late(items: list[dict[str, Any]]) -> Any:
    time.sleep(0.6)
    return sound(items)


@pytest.mark.parametrize(
    ("reaction", "problem"),
    [
        (lambda _: (503, b"PRIVATE"), "the service answered with HTTP status 503"),
        (lambda _: (429, b""), "the service answered with HTTP status 429"),
        (lambda _: None, "the connection failed (RemoteProtocolError)"),
        (lambda _: b"not json", "the answer is not in the schema (1 problems)"),
        (lambda _: {"items": [{"id": "0", "reward": "much"}]}, "the answer is not in the schema (1 problems)"),
        (lambda _: [1], "the answer is not in the schema (1 problems)"),
        (late, "there was no answer within 0.3 s"),
    ],
    ids=["503", "429", "hangs up", "no json", "no number", "no object", "late"],
)
def test_a_request_that_failed_is_made_again_and_then_told(
    service: Service, url: str, reaction: Reaction, problem: str
) -> None:
    with asking(url, timeout_s=0.3, attempts=2) as rewards:
        service.reactions.append(reaction)
        assert given(rewards.score(GROUPS)) == [[1, 2], [3]]
        service.reactions.extend([reaction] * 2)
        with pytest.raises(RewardError) as caught:
            rewards.score(GROUPS)
    assert str(caught.value) == (
        f"scorer http: group 1, completion 1 of 2: {problem} (3 of 3 completions are without a reward after 2 attempts)"
    )


def test_an_answer_that_drips_is_late_as_a_whole() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Dripping) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        started = time.monotonic()
        with asking(url, timeout_s=0.3, attempts=1) as rewards, pytest.raises(RewardError, match=r"within 0\.3 s"):
            rewards.score(GROUPS)
        assert time.monotonic() - started < 20
        server.shutdown()


class Dripping(BaseHTTPRequestHandler):
    """Sends a byte every tenth of a second, so that no single wait is long."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "30")
        self.end_headers()
        for _ in range(30):
            try:
                self.wfile.write(b" ")
            except OSError:
                return
            time.sleep(0.1)

    def log_message(self, *_: Any) -> None: ...


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413])
def test_a_refusal_that_will_not_pass_is_not_repeated(service: Service, url: str, status: int) -> None:
    service.reactions.append(lambda _: (status, b"PRIVATE"))
    with asking(url) as rewards, pytest.raises(RewardError) as caught:
        rewards.score(GROUPS)
    assert str(caught.value) == f"scorer http: the service refuses requests with HTTP status {status}"
    assert len(service.requests) == 1


def test_pauses_grow_between_attempts(service: Service, url: str) -> None:
    times: list[float] = []

    def note(_: Any) -> Any:
        times.append(time.monotonic())
        return 503, b""

    service.reactions.extend([note] * 4)
    with asking(url, attempts=4, backoff_s=0.2) as rewards, pytest.raises(RewardError):
        rewards.score(GROUPS)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    for number, pause in enumerate(pauses):
        assert 0.1 * 2**number <= pause <= 0.2 * 2**number + 0.3


@pytest.mark.parametrize("text", [f"cannot rate {ANSWER}", SECRET + "!" * 100, "Überlast", ""])
def test_no_error_quotes_what_was_asked_or_the_key(
    service: Service, url: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    service.reactions.extend([lambda items: {"items": [{"id": item["id"], "error": text} for item in items]}] * 2)
    with asking(url, key_env="MY_KEY", attempts=2) as rewards, pytest.raises(RewardError) as caught:
        rewards.score([group(ANSWER)])
    assert "completion 1 of 1: the service refused it" in str(caught.value)
    chain, error = "", caught.value
    while error is not None:
        chain, error = chain + repr(error), error.__cause__ or error.__context__  # type: ignore[assignment]
    assert not any(private in chain for private in (SECRET, PROMPT, ANSWER))


def test_an_error_code_is_told(service: Service, url: str) -> None:
    service.reactions.extend([lambda items: {"items": [{"id": item["id"], "error": "too_busy"} for item in items]}])
    with asking(url, attempts=1) as rewards, pytest.raises(RewardError, match="the service says too_busy"):
        rewards.score(GROUPS)


@pytest.mark.parametrize("code", ["too_long", "unreadable"])
def test_a_text_that_the_service_cannot_read_gets_what_is_configured_at_once(
    service: Service, url: str, code: str
) -> None:
    def refusing(items: list[dict[str, Any]]) -> Any:
        answers = [length(i) if i["completion"] != "bb" else {"id": i["id"], "error": code} for i in items]
        return {"items": answers}

    service.reactions.extend([refusing] * 3)
    for settings, expected in (({}, -3), ({"on_unreadable": -1}, -1)):
        with asking(url, **settings) as rewards:
            assert given(rewards.score(GROUPS)) == [[1, expected], [3]]
    with (
        asking(url, on_unreadable="fail") as rewards,
        pytest.raises(RewardError, match=f"group 1, completion 2 of 2: the service says {code}"),
    ):
        rewards.score(GROUPS)
    assert len(service.requests) == 3


def test_a_service_may_abstain_by_null(service: Service, url: str) -> None:
    def maths_only(items: list[dict[str, Any]]) -> Any:
        return {"items": [{"id": i["id"], "reward": 1.0 if "answer" in i["columns"] else None} for i in items]}

    service.reactions.extend([maths_only] * 2)
    settings = [{"name": "http", "url": url}, {"name": "length", "unit": "characters", "target": 3}]
    both = Rewards([scorer_class(each["name"]).model_validate(each) for each in settings], torch.device("cpu"))
    ((first, _), (last,)) = (each.completions for each in both.score(GROUPS))
    assert (first.scores, last.scores) == ({"length": pytest.approx(1 / 3)}, {"http": 1.0, "length": 1.0})
    both.close()
    with asking(url) as alone, pytest.raises(RewardError, match="completion 1 of 2: every scorer abstains"):
        alone.score(GROUPS)
    assert len(service.requests) == 2


def test_a_service_is_told_that_an_answer_was_cut(service: Service, url: str) -> None:
    completions = (Completion(text="a"), Completion(text="bb", truncated=True))
    with asking(url) as rewards:
        rewards.score([Group(id="1", prompt="p", completions=completions)])
    (request,) = service.requests
    assert [item.get("truncated") for item in request["items"]] == [None, True]


def test_what_no_json_can_hold_is_not_sent(service: Service, url: str) -> None:
    with asking(url) as rewards:
        assert given(rewards.score([group("\ud800", "ccc")])) == [[-3, 3]]
        with pytest.raises(RewardError, match="cannot be written as JSON"):
            rewards.score([group("a", answer=object())])
    assert service.asked == [["ccc"]]
    config = scorer_class("http").model_validate({"name": "http", "url": url})
    config.check_row({"answer": [4, None]})
    with pytest.raises(RewardError, match=r"the kept columns \(answer\) cannot be written as JSON"):
        config.check_row({"answer": object()})


def test_nobody_listening_is_an_error_after_all_attempts() -> None:
    with (
        asking(f"http://127.0.0.1:{free_port()}/", attempts=3) as rewards,
        pytest.raises(RewardError, match=r"the connection failed \(ConnectError\) .* after 3 attempts"),
    ):
        rewards.score(GROUPS)


SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
        answer = {"items": [{"id": i["id"], "reward": len(i["completion"])} for i in items]}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *_): pass
HTTPServer.allow_reuse_address = True
server = HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("ready", flush=True)
server.serve_forever()
"""


def start_server(port: int) -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    return server


def test_a_service_that_is_killed_and_comes_back_is_waited_for() -> None:
    port = free_port()
    server = start_server(port)
    with asking(f"http://127.0.0.1:{port}/", attempts=8, backoff_s=0.2) as rewards:
        assert given(rewards.score(GROUPS)) == [[1, 2], [3]]
        server.kill()
        server.wait()
        back: list[subprocess.Popen[str]] = []
        timer = threading.Timer(1.0, lambda: back.append(start_server(port)))
        timer.start()
        try:
            assert given(rewards.score(GROUPS)) == [[1, 2], [3]]
        finally:
            timer.join()
            for each in back:
                each.kill()
                each.wait()
