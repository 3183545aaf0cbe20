"""A service of two replicas under hostile, impatient and unlucky circumstances."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.feedback.keys import create_key, rotate_key
from serving.feedback.store import Store
from serving.replica.trial_process import NICENESS
from tests.processes import descendants, engine_processes
from tests.serving.conftest import Running, holding, started

TURNS = [{"role": "user", "content": "the quick brown fox"}]
MODEL = "tiny"
LONG = 6000
"""Tokens of an answer of minutes."""
ENDING = 1000
"""Tokens of an answer of seconds: many times longer than an endpoint takes to close its door, which is 0.2 s."""
PATIENCE_S = 60
"""A request that waits for what never ends waits longer."""


@pytest.fixture(scope="module")
def tiny(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A tiny model on two replicas, with narrow limits."""
    folder = tmp_path_factory.mktemp("tiny")
    settings = (
        f"name={MODEL}",
        "min_replicas=2",
        "max_replicas=2",
        "max_num_seqs=4",
        "max_queued_requests=8",
        f"limits.max_tokens={LONG}",
        "limits.max_n=4",
        "limits.max_body_mib=0.1",
        "limits.body_timeout_s=5",
        "limits.form_timeout_s=0.5",
        "limits.answers_in_progress=0",  # one key fills all places
        "limits.tokens_in_progress=0",
        "kv_cache_gib=0.1",
    )
    with started(longer(tiny_model, folder / MODEL), folder, *settings) as running:
        yield running


def longer(model: Path, folder: Path) -> Path:
    """A copy of a model that takes longer texts."""
    shutil.copytree(model, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": LONG + 500}))
    return folder


def chat(endpoint: Running, **more: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": TURNS, "max_tokens": 4, **more}
    return endpoint.ask("POST", "/v1/chat/completions", body, role="user")


def assert_refused(answer: httpx.Response, *statuses: int) -> None:
    assert answer.status_code in (statuses or (400, 413, 422)), answer.text[:300]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert len(answer.content) < 2048
    assert "Traceback" not in answer.text and 'File "' not in answer.text


def engines_of(endpoint: Running) -> list[psutil.Process]:
    """The processes of vLLM; waits for two."""
    deadline = time.monotonic() + 180
    while True:
        found = engine_processes(of=endpoint.process.pid)
        if len(found) == 2 or time.monotonic() > deadline:
            return found
        time.sleep(1)


def test_every_route_wants_a_key(tiny: Running) -> None:
    schema = tiny.ask("GET", "/openapi.json").json()
    public = {"/healthz", "/readyz"}
    assert {"/v1/chat/completions", "/v1/rewards", "/v1/feedback", "/metrics"} <= schema["paths"].keys()
    for path, methods in schema["paths"].items():
        for method in methods:
            answer = httpx.request(method, tiny.url + path.replace("{", "").replace("}", ""), timeout=60)
            assert (answer.status_code == 401) == (path not in public), path


@pytest.mark.parametrize(
    "path",
    ["/collective_rpc", "/update_weights", "/pause", "/invocations", "/load", "/server_info", "/v1/load_lora_adapter"],
)
def test_controls_of_the_engine_are_not_there(tiny: Running, path: str) -> None:
    assert_refused(tiny.ask("POST", path, {}), 404)
    assert httpx.post(tiny.url + path, json={}).status_code == 401


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": 10**9},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"n": 10**6},
        {"n": 0},
        {"logprobs": True, "top_logprobs": 10**6},
        {"top_logprobs": -1},
        {"temperature": -1},
        {"temperature": 10**9},
        {"top_p": -1},
        {"stop": ["x"] * 1000},
        {"seed": 2**80},
        {"model": "another"},
        {"model": None},
        {"messages": []},
        {"messages": [{"role": "user"}] * 2000},
        {"messages": [{"role": "user", "content": "fox " * 20_000}]},
        {"messages": [{"role": "god", "content": "x"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
            ]
        },
        {"chat_template": "{{ 7 * 7 }}"},
        {"chat_template_kwargs": {"tokenize": True}},
        {"prompt_embeds": "AAAA"},
        {"prompt_logprobs": 5},
        {"best_of": 10**6},
        {"use_beam_search": True},
        {"response_format": {"type": "json_schema"}},
        {"logit_bias": {"99999999": 100}},
    ],
    ids=lambda more: "-".join(more),
)
def test_what_asks_for_too_much_is_refused_and_the_engine_lives(tiny: Running, more: dict[str, Any]) -> None:
    assert_refused(chat(tiny, **more), 400, 404)
    assert chat(tiny).status_code == 200


@pytest.mark.parametrize(
    "format",
    [
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "(a+)+$("}}},
    ],
    ids=["endless", "unknown-type", "bad-pattern"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_impossible_form_of_answer_hurts_nobody_else(tiny: Running, format: dict[str, Any], stream: bool) -> None:
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(chat, tiny) for _ in range(4)]
        answer = chat(tiny, response_format=format, stream=stream)
        assert answer.status_code == 400, answer.text[:300]
        assert all(other.result().status_code == 200 for other in others)


def schema(**schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


MANY_PROPERTIES: dict[str, Any] = {f"p{number}": {} for number in range(4500)}


@pytest.mark.parametrize(
    ("more", "within_s"),
    [
        (schema(type="string", pattern="(" * 30_000 + "a" + ")" * 30_000), 1),
        ({"structured_outputs": {"regex": "(" * 30_000 + "a" + ")" * 30_000}}, 1),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"enum": ["("] * 9000}}}]}, 1),
        (schema(type="string", pattern="a{1,129}"), 1),
        (schema(type="object", properties=MANY_PROPERTIES, additionalProperties=False), PATIENCE_S),
        ({"structured_outputs": {"grammar": "root ::= nothing"}}, PATIENCE_S),
        ({"response_format": {"type": "structural_tag", "format": {"type": "nonsense"}}}, PATIENCE_S),
    ],
    ids=["brackets", "regex", "tools", "repeat", "slow", "grammar", "tag"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_form_that_would_kill_or_stall_an_engine_is_refused_and_none_is_killed(
    tiny: Running, more: dict[str, Any], within_s: float, stream: bool
) -> None:
    engines = {engine.pid for engine in engines_of(tiny)}
    chat(tiny)
    began = time.monotonic()
    answer = chat(tiny, **more, stream=stream)
    took_s = time.monotonic() - began
    print(f"{answer.status_code} after {took_s:.2f} s: {answer.text[:200]}")
    assert_refused(answer, 400)
    assert took_s < within_s
    assert chat(tiny).status_code == 200
    assert {engine.pid for engine in engines_of(tiny)} == engines and len(engines) == 2


def test_an_answer_can_be_asked_for_in_a_form(tiny: Running) -> None:
    properties = {"a": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = chat(tiny, response_format=form, max_tokens=60)
    assert answer.status_code == 200, answer.text
    assert set(json.loads(answer.json()["choices"][0]["message"]["content"])) == {"a"}


def test_forms_are_compiled_at_a_lower_priority_than_answers_are_drawn(tiny: Running) -> None:
    compile_anew = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"enum": ["priority", "none"]}}}
    assert chat(tiny, response_format=compile_anew, max_tokens=60).status_code == 200
    threads = {
        thread.id: os.getpriority(os.PRIO_PROCESS, thread.id)
        for engine in engines_of(tiny)
        for thread in engine.threads()
    }
    assert NICENESS in threads.values()
    assert all(threads[engine.pid] == 0 for engine in engines_of(tiny))


def test_tools_whose_calls_the_endpoint_cannot_read_are_refused_in_its_own_words(tiny: Running) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "required"}, {"tool_choice": named}):
        answer = chat(tiny, tools=[tool], **choice)
        assert_refused(answer, 400)
        assert "tool_call_parser" in answer.json()["error"]["message"]
        assert "--" not in answer.json()["error"]["message"]
    assert chat(tiny, tools=[tool], tool_choice="none").status_code == 200


def test_tokens_of_a_text_and_of_a_chat(tiny: Running) -> None:
    answer = tiny.ask("POST", "/tokenize", {"model": MODEL, "prompt": "fox"}, role="user")
    assert answer.status_code == 200, answer.text
    text = answer.json()
    whole = tiny.ask("POST", "/tokenize", {"model": MODEL, "messages": TURNS}, role="user").json()
    assert text["count"] == len(text["tokens"]) < whole["count"]


def test_headers_cannot_switch_off_the_end_of_a_request(tiny: Running) -> None:
    headers = {
        "authorization": f"Bearer {tiny.keys['user']}",
        "x-request-disconnect-disabled": "?1",
        "x-request-timeout-seconds": "0",
        "serve-multiplexed-model-id": "something",
    }
    body = {"model": MODEL, "messages": TURNS, "max_tokens": LONG, "stream": True, "ignore_eos": True}
    for _ in range(20):  # more than there are places, and minutes of work
        with httpx.stream("POST", f"{tiny.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as stream:
            assert stream.status_code == 200
            next(stream.iter_lines())
    started_at = time.monotonic()
    assert chat(tiny).status_code == 200
    assert time.monotonic() - started_at < PATIENCE_S


def test_who_sends_slowly_is_given_up_and_holds_nobody_up(tiny: Running) -> None:
    host, port = tiny.url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(100)]
    head = (
        f"POST /v1/feedback HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {tiny.keys['user']}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    for connection in slow:
        connection.sendall(head.encode())
    assert chat(tiny).status_code == 200
    assert not select.select(slow, [], [], 0)[0], "it was answered while all of them were waited for"
    slow[0].settimeout(PATIENCE_S)
    assert b"408" in slow[0].recv(200)
    for connection in slow:
        connection.close()


@pytest.mark.alone
@pytest.mark.slow  # sends a gigabyte
def test_enormous_headers_are_refused_and_most_of_their_memory_is_given_back(tiny: Running) -> None:
    host, port = tiny.url.removeprefix("http://").split(":")
    before = memory_mib(tiny)
    for _ in range(80):  # of 16 MB each, which Ray's HTTP server does not limit
        with socket.create_connection((host, int(port))) as connection:
            connection.settimeout(20)
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n")
            try:
                for number in range(4000):
                    connection.sendall(f"x-{number}: {'y' * 4000}\r\n".encode())
                connection.sendall(b"\r\n")
                answer = connection.recv(2048)
            except OSError:  # it hung up before it had read all that
                answer = b""
        assert answer[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431", b"HTTP/1.1 401"), answer
    assert memory_mib(tiny) - before < 800, "of 1,280 that were sent; it goes up and down, and stops growing"
    assert chat(tiny).status_code == 200


def memory_mib(endpoint: Running) -> float:
    """Of what listens."""
    return sum(each.memory_info().rss for each in descendants("Proxy", of=endpoint.process.pid)) / 2**20


def test_keys_change_while_it_serves(tiny: Running) -> None:
    def status(key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.get(f"{tiny.url}/v1/models", headers=headers, timeout=60).status_code

    def becomes(key: str, wanted: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while status(key) != wanted:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    store = Store(tiny.database)
    first = create_key(store, name="guest", role="user")
    becomes(first, 200)
    second = rotate_key(store, "guest")
    becomes(second, 200)
    becomes(first, 401)
    store.revoke_key("guest")
    becomes(second, 401)
    store.close()


def test_hundreds_of_idle_connections_and_half_sent_headers_hold_nobody_up(tiny: Running) -> None:
    host, port = tiny.url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(500)]
    for number, connection in enumerate(idle):
        whole = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n"
        connection.sendall(whole.encode()[: None if number % 2 else -6])
    for _ in range(20):
        started_at = time.monotonic()
        assert chat(tiny).status_code == 200
        assert time.monotonic() - started_at < PATIENCE_S
    for connection in idle:
        connection.close()


def test_a_conversation_stays_with_its_replica_and_others_go_elsewhere(tiny: Running) -> None:
    engines_of(tiny)

    def asked() -> list[int]:
        return [one["asked"] for one in tiny.ask("GET", "/v1/admin/versions").json()["replicas"]]

    def more(before: list[int]) -> list[int]:
        return sorted(after - earlier for earlier, after in zip(sorted(before), sorted(asked()), strict=True))

    def tell(*contents: str) -> None:
        roles = ("user", "assistant") * 10
        turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        assert chat(tiny, messages=turns).status_code == 200

    before = asked()
    for length in range(1, 12, 2):
        tell(*(f"turn {number}" for number in range(length)))
    assert more(before) == [0, 6]
    before = asked()
    for number in range(30):
        tell(f"conversation {number}")
    assert min(more(before)) > 5


def test_more_than_there_is_room_for_is_refused_with_a_time_to_come_back(tiny: Running) -> None:
    with ThreadPoolExecutor(80) as pool:
        answers = list(pool.map(lambda _: chat(tiny, max_tokens=100, ignore_eos=True), range(80)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 503)
    assert chat(tiny).status_code == 200


def test_metrics_are_told_by_version(tiny: Running) -> None:
    def counted(text: str, name: str, **labels: str) -> float:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())

    before = tiny.ask("GET", "/metrics").text
    usage = chat(tiny).json()["usage"]
    silent = chat(tiny, stream=True).text
    spoken = chat(tiny, stream=True, stream_options={"include_usage": True}).text
    assert chat(tiny, structured_outputs={"grammar": "root ::= nothing"}).status_code == 400
    text = tiny.ask("GET", "/metrics").text

    def rise(name: str, **labels: str) -> float:
        return counted(text, name, **labels) - counted(before, name, **labels)

    told = {"route": "/v1/chat/completions", "version": "1"}
    assert rise("raylign_requests_total", status="200", **told) == 3
    assert rise("raylign_request_seconds_count", **told) == 3 and rise("raylign_first_token_seconds_count", **told) == 2
    assert rise("raylign_forms_refused_total", reason="error") == 1
    assert "usage" not in silent and spoken.count('"choices":[],"usage":{') == 1
    assert rise("raylign_prompt_tokens_total", version="1") == 3 * usage["prompt_tokens"]
    assert 3 <= rise("raylign_completion_tokens_total", version="1") <= 12, "4 tokens each at most"
    assert counted(text, "raylign_version") == 1
    for part in ("key", "body", "version", "record"):
        assert rise("raylign_part_seconds_count", part=part) >= 3


def test_without_recording_no_text_is_kept_and_nothing_is_compared(tiny: Running) -> None:
    id = chat(tiny).json()["id"]
    said = tiny.ask("POST", "/v1/feedback", {"kind": "thumb", "id": id, "up": True}, role="labeller")
    assert said.status_code == 200
    assert_refused(tiny.ask("POST", "/v1/comparisons", {"messages": TURNS}), 409)
    assert tiny.ask("GET", "/v1/feedback/export").text == ""
    assert b"quick brown" not in b"".join(file.read_bytes() for file in tiny.folder.glob("raylign.sqlite*"))


def test_rewards_of_whole_weights_without_a_reference_are_refused_in_words(tiny: Running) -> None:
    answer = tiny.ask("POST", "/v1/rewards", {"items": [{"prompt": "x", "completions": ["y"]}]})
    assert answer.status_code == 409
    assert "rewards.reference" in answer.json()["error"]["message"]


def test_no_key_and_no_text_is_told_in_logs_or_figures(tiny: Running) -> None:
    secrets = [*tiny.keys.values(), "quick brown"]
    assert not holding(tiny, *secrets)
    assert not [secret for secret in secrets if secret in tiny.ask("GET", "/metrics").text]


@pytest.mark.slow  # a replica starts again
def test_a_killed_replica_fails_what_it_worked_on_and_nothing_else_and_comes_back(tiny: Running) -> None:
    failed: list[httpx.Response] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            answer = chat(tiny, max_tokens=20)
            if answer.status_code != 200:
                failed.append(answer)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    engines = engines_of(tiny)
    assert len(engines) == 2
    replica = engines[0].parent()
    assert replica is not None
    replica.kill()
    _, alive = psutil.wait_procs([replica], timeout=PATIENCE_S)
    assert not alive
    time.sleep(2)  # requests go on without it
    done.set()
    for thread in threads:
        thread.join()
    assert len(failed) <= len(threads), "each client had one request in progress"
    assert all(answer.status_code == 503 and "retry-after" in answer.headers for answer in failed)
    deadline = time.monotonic() + 240
    while len(tiny.ask("GET", "/v1/admin/versions").json()["replicas"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert {one["version"] for one in tiny.ask("GET", "/v1/admin/versions").json()["replicas"]} == {1}


@pytest.mark.slow  # a replica starts again
def test_a_replica_whose_engine_died_sends_what_it_has_not_begun_to_another(tiny: Running) -> None:
    engines = engines_of(tiny)
    assert len(engines) == 2
    engines[0].kill()
    answers = [chat(tiny, messages=[{"role": "user", "content": f"conversation {number}"}]) for number in range(30)]
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) >= 29, statuses  # the first to come may be what tells the replica
    assert set(statuses) <= {200, 500, 503}
    deadline = time.monotonic() + 240
    while len(engines_of(tiny)) < 2 or engines[0] in engines_of(tiny):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_an_endpoint_that_is_ended_ends_its_streams_first_and_takes_no_more(tiny: Running) -> None:
    body = {"model": MODEL, "messages": TURNS, "max_tokens": ENDING, "ignore_eos": True, "stream": True}
    begun = threading.Semaphore(0)

    def stream() -> list[str]:
        headers = {"authorization": f"Bearer {tiny.keys['user']}"}
        url = f"{tiny.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=300) as answer:
            lines = answer.iter_lines()
            next(lines)
            begun.release()
            return [line for line in lines if line]

    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(stream) for _ in range(2)]
        for _ in streams:
            assert begun.acquire(timeout=60)
        tiny.process.send_signal(signal.SIGTERM)
        until_refused(tiny)
        assert not any(each.done() for each in streams), "they have to be longer than the endpoint takes to close"
        ended = [each.result() for each in streams]
    assert all('"finish_reason":"length"' in told[-2] and told[-1] == "data: [DONE]" for told in ended)
    assert tiny.process.wait(120) == 0


def until_refused(endpoint: Running) -> None:
    """Returns when new requests are refused."""

    def is_refused() -> bool:
        try:
            return chat(endpoint).status_code in (404, 503)
        except httpx.TransportError:
            return True

    started_at = time.monotonic()
    while not is_refused():
        assert time.monotonic() - started_at < PATIENCE_S
        time.sleep(0.2)
