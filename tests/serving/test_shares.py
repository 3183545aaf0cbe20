"""One key cannot take all places of an engine, nor hold up others by what it sends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from serving.config import LimitsConfig
from serving.guard import Guard
from serving.keys import Key, Role
from serving.routes import spend_form_seconds
from serving.schema import Refused, check_num_values, sound_json
from serving.shares import FormSeconds, KeyShare, RequestSize, request_size

LIMITS = LimitsConfig(max_tokens=100)
KEYS = {
    b"Bearer anna": Key(name="anna", role="user"),
    b"Bearer ben": Key(name="ben", role="user"),
    b"Bearer root": Key(name="root", role="admin"),
}


@pytest.mark.parametrize(
    ("body", "num_answers", "num_tokens"),
    [
        ({}, 1, 10),
        ({"messages": [{}]}, 1, 110),
        ({"messages": [{}], "max_tokens": 5}, 1, 15),
        ({"messages": [{}], "max_tokens": 5, "max_completion_tokens": 7, "n": 3}, 3, 31),
        ({"messages": [{}], "max_tokens": 10**9}, 1, 110),
        ({"prompt": "text", "max_tokens": 1, "n": 2}, 2, 12),
        ({"prompt": [1, 2, 3], "max_tokens": 1}, 1, 11),
        ({"prompt": ["a", "b", "c"], "max_tokens": 2, "n": 2}, 6, 22),
        ({"prompt": [[1], [2]], "max_tokens": 2}, 2, 14),
        ({"prompt": [], "n": "many", "max_tokens": None}, 1, 110),
        ({"messages": 7, "n": -5, "max_tokens": [1]}, 1, 110),
        ({"items": [1, 2]}, 1, 10),
    ],
)
def test_the_size_of_a_request(body: dict[str, Any], num_answers: int, num_tokens: int) -> None:
    assert request_size(body, 40, LIMITS) == RequestSize(num_answers=num_answers, num_tokens=num_tokens)


def begin(share: KeyShare, *, answers: int = 1, tokens: int = 0) -> AbstractContextManager[Any]:
    """Begins a request; its size is told."""
    held = share.hold()
    grow = held.__enter__()
    try:
        grow(RequestSize(num_answers=answers, num_tokens=tokens))
    except Refused:
        held.__exit__(None, None, None)
        raise
    return held


def test_a_key_that_has_enough_in_progress_waits_until_some_of_it_has_ended() -> None:
    share = KeyShare("user", LimitsConfig(answers_in_progress=4, tokens_in_progress=100))
    first = begin(share, answers=3, tokens=50)
    with pytest.raises(Refused) as refused:
        begin(share, answers=2)
    assert refused.value.reply.status == 429 and refused.value.reply.retry_after_s
    assert "3 answers" in refused.value.reply.body
    with pytest.raises(Refused, match="50 tokens"):
        begin(share, tokens=51)
    second = begin(share, tokens=50)
    with pytest.raises(Refused):
        begin(share)
    first.__exit__(None, None, None)
    third = begin(share, answers=3, tokens=50)
    for held in (second, third):
        held.__exit__(None, None, None)


def test_a_request_alone_is_never_too_large_for_its_key() -> None:
    share = KeyShare("user", LimitsConfig(answers_in_progress=4, tokens_in_progress=100))
    alone = begin(share, answers=50, tokens=5000)
    with pytest.raises(Refused):
        begin(share)
    alone.__exit__(None, None, None)
    begin(share)


@pytest.mark.parametrize(("role", "many"), [("user", False), ("labeller", False), ("admin", True)])
def test_by_default_all_keys_but_those_of_admins_have_limits(role: Role, many: bool) -> None:
    share = KeyShare(role, LimitsConfig())
    held = [begin(share) for _ in range(32)]
    assert len(held) == 32
    if many:
        begin(share, answers=1000, tokens=10**9)
    else:
        with pytest.raises(Refused):
            begin(share)


def test_who_has_spent_too_much_on_forms_waits_until_the_bucket_fills() -> None:
    seconds = FormSeconds(30.0)
    assert seconds.wait_s(100.0) == 0.0
    seconds.spend(29.0, 100.0)
    assert seconds.wait_s(100.0) == 0.0
    seconds.spend(11.0, 100.0)  # of which there is only one
    assert seconds.wait_s(100.0) == pytest.approx(20.0)
    assert seconds.wait_s(110.0) == pytest.approx(10.0)
    assert seconds.wait_s(121.0) == 0.0
    unlimited = FormSeconds(0.0)
    unlimited.spend(1000.0, 100.0)
    assert unlimited.wait_s(100.0) == 0.0


def test_only_requests_with_a_form_wait_for_what_was_spent_on_forms() -> None:
    async def scene() -> None:
        guard = guarded(lambda: asyncio.sleep(0))
        async with client_of(guard, "anna") as anna, client_of(guard, "root") as root:
            form = {"response_format": {"type": "json_object"}}
            assert (await anna.post("/work", json=form)).status_code == 200
            for name in ("anna", "root"):
                await client_of(guard, name).post("/spend", json={"seconds": 1000})
            refused = await anna.post("/work", json=form)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 60
            assert (await anna.post("/work", json={"tools": []})).status_code == 200
            assert (await root.post("/work", json=form)).status_code == 200

    asyncio.run(scene())


def guarded(on_request: Callable[[], Any], **limits: Any) -> Guard:
    app = FastAPI()

    @app.post("/work")
    async def work(request: Request) -> str:
        await on_request()
        return "done"

    @app.post("/spend")
    async def spend(request: Request) -> str:
        spend_form_seconds(request, request.scope["state"]["json"]["seconds"])
        return "done"

    return Guard(
        app, who=lambda headers: KEYS.get(headers[0]), is_public=lambda _: False, limits=LimitsConfig(**limits)
    )


def client_of(guard: Guard, name: str) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {name}", "content-type": "application/json"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://here", headers=headers)


def test_one_key_is_told_to_wait_while_others_are_answered_and_gets_its_places_back() -> None:
    async def scene() -> None:
        go_on = asyncio.Event()
        guard = guarded(go_on.wait, answers_in_progress=3)
        async with client_of(guard, "anna") as anna, client_of(guard, "ben") as ben, client_of(guard, "root") as root:
            three = [asyncio.create_task(anna.post("/work", json={})) for _ in range(3)]
            await asyncio.sleep(0.05)
            refused = await anna.post("/work", json={})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            others = [asyncio.create_task(ben.post("/work", json={}))]
            others += [asyncio.create_task(root.post("/work", json={})) for _ in range(20)]
            three[0].cancel()  # this client goes away
            await asyncio.sleep(0.05)
            three.append(asyncio.create_task(anna.post("/work", json={})))
            await asyncio.sleep(0.05)
            go_on.set()
            answers = await asyncio.gather(*three[1:], *others)
            assert {answer.status_code for answer in answers} == {200}
            assert (await anna.post("/work", json={"n": 1000})).status_code == 200

    asyncio.run(scene())


def test_bodies_that_are_still_being_sent_count_too() -> None:
    async def scene() -> None:
        async def endless() -> Any:
            while True:
                yield b" "
                await asyncio.sleep(0.01)

        guard = guarded(lambda: asyncio.sleep(0), answers_in_progress=2, body_timeout_s=1)
        async with client_of(guard, "anna") as anna:
            slow = [asyncio.create_task(anna.post("/work", content=endless())) for _ in range(2)]
            await asyncio.sleep(0.1)
            assert (await anna.post("/work", json={})).status_code == 429
            assert {answer.status_code for answer in await asyncio.gather(*slow)} == {408}
            assert (await anna.post("/work", json={})).status_code == 200

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("body", "passes"),
    [
        (b'{"a": [1, 2, 3]}', True),
        (json.dumps({"a": list(range(50))}).encode(), True),
        (json.dumps({"a": list(range(150))}).encode(), False),
        (b'{"a": [' + b"[]," * 150 + b"1]}", False),
        (b'{"a": [' + b"{}," * 150 + b"1]}", False),
        (b'{"a": [' + b'"",' * 150 + b'""]}', False),
        (json.dumps({"a": 'one, two, [three], {four}, "five", \\' * 100}).encode(), True),
        (b'"' + b",[{" * 100, False),
    ],
)
def test_the_values_in_a_body_are_counted_and_not_what_stands_in_its_texts(body: bytes, passes: bool) -> None:
    if passes:
        check_num_values(body, 100)
    else:
        with pytest.raises(Refused, match="more than 100 values"):
            check_num_values(body, 100)


MIB_4 = 4 * 2**20 - 100


def test_bodies_full_of_values_hold_up_the_event_loop_less_than_reading_a_part_of_one_would() -> None:
    body = b'{"a": [' + b"[]," * (MIB_4 // 3) + b"1]}"
    part = b'{"a": [' + b"[]," * (MIB_4 // 12) + b"1]}"
    began = time.monotonic()
    sound_json(part)
    read_s = time.monotonic() - began

    async def scene() -> float:
        longest, done = 0.0, False

        async def watch() -> None:
            nonlocal longest
            while not done:
                before = time.monotonic()
                await asyncio.sleep(0.001)
                longest = max(longest, time.monotonic() - before)

        watching = asyncio.create_task(watch())
        async with client_of(guarded(lambda: asyncio.sleep(0)), "anna") as anna:
            answers = await asyncio.gather(*(anna.post("/work", content=body) for _ in range(4)))
        assert {answer.status_code for answer in answers} == {400}
        done = True
        await watching
        return longest

    longest = asyncio.run(scene())
    print(f"a quarter of one takes {read_s * 1e3:.0f} ms; four held up the loop for {longest * 1e3:.0f} ms at most")
    assert longest < read_s
