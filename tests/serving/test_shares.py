"""One key cannot take all places of an engine, nor hold up others by what it sends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from serving.config import Device, LimitsConfig, ServeConfig
from serving.feedback.keys import Key, Role
from serving.http.access import AccessMiddleware
from serving.http.routes import spend_form_seconds
from serving.http.shares import ActiveKeys, FormSeconds, KeyShare, RequestSize, refusal_delay_s, request_size
from serving.schema import RequestError, check_num_values, parse_json

LIMITS = LimitsConfig(max_tokens=100)
KEYS = {
    b"Bearer anna": Key(name="anna", role="user"),
    b"Bearer ben": Key(name="ben", role="user"),
    b"Bearer root": Key(name="root", role="admin"),
}


@pytest.mark.parametrize(
    ("body", "num_answers", "num_tokens"),
    [
        ({}, 0, 10),
        ({"kind": "thumb", "id": "x", "up": True}, 0, 10),
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


class OneRequest:
    """A request of a key, which ends when it is told to."""

    def __init__(self, share: KeyShare, *, answers: int = 1, tokens: int = 0, may_wait: bool = True) -> None:
        self.has_begun, self._ends = asyncio.Event(), asyncio.Event()
        size = RequestSize(num_answers=answers, num_tokens=tokens)
        self.task = asyncio.create_task(self._run(share, size, may_wait))

    async def _run(self, share: KeyShare, size: RequestSize, may_wait: bool) -> None:
        async with share.slot(size, may_wait=may_wait):
            self.has_begun.set()
            await self._ends.wait()

    async def end(self) -> None:
        self._ends.set()
        await self.task


async def settle() -> None:
    """Lets everything happen that can happen without a wait."""
    for _ in range(10):
        await asyncio.sleep(0)


def key_share(role: Role = "user", **limits: int) -> KeyShare:
    settings = {"answers_in_progress": 4, "tokens_in_progress": 100, **limits}
    return KeyShare("anna", role, LimitsConfig(**settings), ActiveKeys())


def test_what_a_key_has_no_room_for_begins_in_its_order_when_others_of_it_have_ended() -> None:
    async def scene() -> None:
        share = key_share()
        first = OneRequest(share, answers=3, tokens=50)
        await settle()
        large, small = OneRequest(share, answers=2, tokens=1), OneRequest(share, answers=1)
        of_none = OneRequest(share, answers=0, tokens=1000)
        await settle()
        assert first.has_begun.is_set() and of_none.has_begun.is_set()
        assert not large.has_begun.is_set() and not small.has_begun.is_set()  # which came later, though it would fit
        await of_none.end()
        assert not large.has_begun.is_set()
        await first.end()
        await settle()
        assert large.has_begun.is_set() and small.has_begun.is_set()
        many_tokens = OneRequest(share, tokens=101)
        await settle()
        assert not many_tokens.has_begun.is_set()
        await large.end()
        await small.end()
        await settle()
        assert many_tokens.has_begun.is_set()  # alone, none is too large
        await many_tokens.end()

    asyncio.run(scene())


def test_what_may_not_wait_is_refused_with_the_figures() -> None:
    async def scene() -> None:
        share = key_share()
        first = OneRequest(share, answers=3, tokens=50)
        await settle()
        for more, text in (({"answers": 2}, "3 answers"), ({"tokens": 51}, "50 tokens")):
            refused = OneRequest(share, may_wait=False, **more)
            with pytest.raises(RequestError, match=text) as error:
                await refused.task
            assert error.value.reply.status == 429 and error.value.reply.retry_after_s
        await first.end()
        await OneRequest(share, answers=16, tokens=5000, may_wait=False).end()
        with pytest.raises(RequestError, match="asks for 17 answers, and one of this key may ask for 16") as too_many:
            await OneRequest(share, answers=17).task
        assert too_many.value.reply.status == 400

    asyncio.run(scene())


def test_who_waits_too_long_is_refused_and_who_leaves_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        share = key_share()
        first = OneRequest(share, answers=4)
        await settle()
        gone, next_one = OneRequest(share, answers=4), OneRequest(share, answers=1)
        await settle()
        gone.task.cancel()
        await settle()
        await first.end()
        await settle()
        assert next_one.has_begun.is_set() and not gone.has_begun.is_set()
        monkeypatch.setattr("serving.http.shares.WAIT_S", 0.01)
        late = OneRequest(share, answers=4)
        with pytest.raises(RequestError, match="1 answers in progress, and may have 4; this request asks for 4"):
            await late.task
        await next_one.end()
        await OneRequest(share, answers=4, may_wait=False).end()  # nothing is counted any more

    asyncio.run(scene())


def test_one_that_is_given_up_while_another_ends_is_no_error() -> None:
    """It was cancelled, and has not run yet, when the one that ends looks whose turn it is."""

    async def scene() -> None:
        share = key_share()
        first = OneRequest(share, answers=4)
        await settle()
        gone, next_one = OneRequest(share, answers=4), OneRequest(share, answers=1)
        await settle()
        first._ends.set()
        gone.task.cancel()
        await first.task
        with pytest.raises(asyncio.CancelledError):
            await gone.task
        await settle()
        assert next_one.has_begun.is_set() and not share.num_waiting
        await next_one.end()
        await OneRequest(share, answers=4, may_wait=False).end()

    asyncio.run(scene())


def test_as_many_wait_as_may_also_where_answers_have_no_limit() -> None:
    async def scene() -> None:
        share = key_share(answers_in_progress=0, requests_waiting=2)
        first = OneRequest(share, tokens=90)
        await settle()
        waiting = [OneRequest(share, tokens=90) for _ in range(2)]
        await settle()
        with pytest.raises(RequestError, match="90 tokens in progress"):
            await OneRequest(share, tokens=90).task
        await first.end()
        for one in waiting:
            await one.end()

    asyncio.run(scene())


def test_a_request_that_is_given_up_when_its_turn_comes_keeps_no_room() -> None:
    async def scene() -> None:
        share = key_share()
        first = OneRequest(share, answers=4)
        await settle()
        second = OneRequest(share, answers=4)
        await settle()
        first._ends.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second.task.cancel()
        await settle()
        await OneRequest(share, answers=4, may_wait=False).end()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("device", "num_cores", "settings", "expected"),
    [
        ("cpu", 2, {}, 2),
        ("cpu", 16, {}, 8),
        ("cpu", 16, {"min_replicas": 4, "max_replicas": 4}, 8),
        ("cuda", 2, {}, 8),
        ("cuda", 2, {"max_num_seqs": 256, "min_replicas": 2, "max_replicas": 2}, 64),
        ("cuda", 2, {"max_num_seqs": 4, "min_replicas": 0}, 2),
        ("cpu", 2, {"limits": {"answers_in_progress": 7}}, 7),
        ("cpu", 2, {"limits": {"answers_in_progress": 0}}, 0),
    ],
)
def test_a_key_may_have_an_eighth_of_what_the_replicas_answer_at_once(
    device: Device, num_cores: int, settings: dict[str, Any], expected: int
) -> None:
    config = ServeConfig(checkpoint="x", **settings)
    assert config.limits_on(device, num_cores=num_cores).answers_in_progress == expected


@pytest.mark.parametrize(
    ("device", "num_cores", "settings", "expected"),
    [
        ("cpu", 2, {}, 8),
        ("cuda", 2, {"max_num_seqs": 256, "min_replicas": 2, "max_replicas": 4}, 1024),
        ("cuda", 2, {"limits": {"answers_at_once": 7}}, 7),
        ("cuda", 2, {"limits": {"answers_in_progress": 32}}, 0),
        ("cuda", 2, {"limits": {"answers_in_progress": 32, "answers_at_once": 40}}, 40),
    ],
)
def test_the_keys_share_what_all_replicas_answer_at_once(
    device: Device, num_cores: int, settings: dict[str, Any], expected: int
) -> None:
    config = ServeConfig(checkpoint="x", **settings)
    assert config.limits_on(device, num_cores=num_cores).answers_at_once == expected


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time_s = 100.0

    def __call__(self) -> float:
        return self.time_s


@pytest.mark.parametrize(
    ("at_once", "num_keys", "expected"), [(8, 1, 4), (8, 2, 4), (8, 3, 2), (8, 8, 1), (8, 100, 1), (0, 100, 4)]
)
def test_the_more_keys_ask_the_fewer_answers_each_may_have_in_progress(
    at_once: int, num_keys: int, expected: int
) -> None:
    async def scene() -> None:
        limits, keys = LimitsConfig(answers_in_progress=4, answers_at_once=at_once), ActiveKeys()
        share = KeyShare("anna", "user", limits, keys)
        with ExitStack() as others:
            for number in range(num_keys - 1):
                others.enter_context(keys.presence(f"other-{number}"))
            requests = [OneRequest(share) for _ in range(6)]
            await settle()
            assert sum(request.has_begun.is_set() for request in requests) == expected
            for request in requests:
                await request.end()
            await OneRequest(share, answers=16, may_wait=False).end()  # alone

    asyncio.run(scene())


def test_a_key_asks_until_ten_seconds_after_its_last_answer() -> None:
    clock = Clock()
    keys = ActiveKeys(clock)
    assert keys.count() == 0
    with keys.presence("anna"):
        with keys.presence("anna"), keys.presence("ben"):
            assert keys.count() == 2
        clock.time_s += 9.0
        assert keys.count() == 2
        clock.time_s += 2.0
        assert keys.count() == 1, "an answer may take long"
    clock.time_s += 9.0
    assert keys.count() == 1
    clock.time_s += 2.0
    assert keys.count() == 0


def test_a_request_that_waits_begins_when_fewer_keys_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        monkeypatch.setattr("serving.http.shares.CHECK_S", 0.01)
        clock = Clock()
        keys = ActiveKeys(clock)
        share = KeyShare("anna", "user", LimitsConfig(answers_in_progress=2, answers_at_once=3), keys)
        with keys.presence("ben"):
            first, second = OneRequest(share), OneRequest(share)
            await settle()
        assert first.has_begun.is_set() and not second.has_begun.is_set()
        clock.time_s += 11.0
        await asyncio.wait_for(second.has_begun.wait(), 60)
        await second.end()
        await first.end()

    asyncio.run(scene())


@pytest.mark.parametrize(("num_refused", "delay_s"), [(1, 0.5), (2, 1.0), (9, 4.5), (10, 5.0), (1000, 5.0)])
def test_the_more_requests_of_a_key_are_being_refused_the_later_each_is(num_refused: int, delay_s: float) -> None:
    assert refusal_delay_s(num_refused) == delay_s


def test_requests_that_are_refused_at_the_same_time_count(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        monkeypatch.setattr("serving.http.shares.REFUSAL_DELAY_S", 0.05)
        share = key_share()
        time_s = asyncio.get_running_loop().time

        async def delayed_s() -> float:
            start = time_s()
            await share.delay_refusal()
            return time_s() - start

        delays = await asyncio.gather(*(delayed_s() for _ in range(3)))
        # A timer may come a moment early.
        assert all(delay >= least for delay, least in zip(delays, (0.04, 0.09, 0.14), strict=True))
        assert share._num_refused == 0

    asyncio.run(scene())


@pytest.mark.parametrize(("role", "many"), [("user", False), ("labeller", False), ("admin", True)])
def test_all_keys_but_those_of_admins_have_limits(role: Role, many: bool) -> None:
    share = key_share(role, requests_waiting=2)
    with ExitStack() as present:
        for _ in range(6):
            present.enter_context(share.presence())
        if many:
            present.enter_context(share.presence())
        else:
            with pytest.raises(RequestError, match="6 requests here"):
                present.enter_context(share.presence())
    with share.presence():
        pass


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


def test_what_waits_with_a_form_is_refused_when_those_before_it_have_used_up_what_may_be_spent() -> None:
    async def scene() -> None:
        goes_on = asyncio.Event()
        guard = guarded(goes_on.wait, answers_in_progress=1)
        async with client_of(guard, "anna") as anna:
            asked = {"items": [], "response_format": {"type": "json_object"}}
            first, second = [asyncio.create_task(anna.post("/work", json=asked)) for _ in range(2)]
            await asyncio.sleep(0.05)
            await anna.post("/spend", json={"seconds": 1000})
            goes_on.set()
            assert (await first).status_code == 200
            assert (await second).status_code == 429

    asyncio.run(scene())


def guarded(on_request: Callable[[], Any], **limits: Any) -> AccessMiddleware:
    app = FastAPI()

    @app.post("/work")
    async def work(request: Request) -> str:
        await on_request()
        return "done"

    @app.post("/spend")
    async def spend(request: Request) -> str:
        spend_form_seconds(request, request.scope["state"]["json"]["seconds"])
        return "done"

    limits = {"answers_in_progress": 32, **limits}
    return AccessMiddleware(
        app, authenticate=lambda headers: KEYS.get(headers[0]), is_public=lambda _: False, limits=LimitsConfig(**limits)
    )


def client_of(guard: AccessMiddleware, name: str) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {name}", "content-type": "application/json"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://here", headers=headers)


WORK = {"items": []}


def test_one_key_waits_while_others_are_answered_and_gets_its_places_back() -> None:
    async def scene() -> None:
        go_on = asyncio.Event()
        begun = 0

        async def work() -> None:
            nonlocal begun
            begun += 1
            await go_on.wait()

        guard = guarded(work, answers_in_progress=3, requests_waiting=2)
        async with client_of(guard, "anna") as anna, client_of(guard, "ben") as ben, client_of(guard, "root") as root:
            five = [asyncio.create_task(anna.post("/work", json=WORK)) for _ in range(5)]
            await asyncio.sleep(0.05)
            assert begun == 3
            refused = await anna.post("/work", json=WORK)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            others = [asyncio.create_task(ben.post("/work", json=WORK))]
            others += [asyncio.create_task(root.post("/work", json=WORK)) for _ in range(20)]
            await asyncio.sleep(0.05)
            assert begun == 24
            for gone in (five[0], five[4]):  # of which one is in progress and one waits
                gone.cancel()
            await asyncio.sleep(0.05)
            assert begun == 25
            large = {"items": ["x" * 70_000]}
            assert (await anna.post("/work", json=large)).status_code == 429
            go_on.set()
            answers = await asyncio.gather(*five[1:4], *others)
            assert {answer.status_code for answer in answers} == {200}
            assert (await anna.post("/work", json=WORK | {"n": 12})).status_code == 200

    asyncio.run(scene())


def test_bodies_that_are_still_being_sent_count_too() -> None:
    async def scene() -> None:
        async def endless() -> Any:
            while True:
                yield b" "
                await asyncio.sleep(0.01)

        guard = guarded(lambda: asyncio.sleep(0), answers_in_progress=2, requests_waiting=0, body_timeout_s=1)
        async with client_of(guard, "anna") as anna:
            slow = [asyncio.create_task(anna.post("/work", content=endless())) for _ in range(2)]
            await asyncio.sleep(0.1)
            assert (await anna.post("/work", json={})).status_code == 429
            assert {answer.status_code for answer in await asyncio.gather(*slow)} == {408}
            assert (await anna.post("/work", json={})).status_code == 200

    asyncio.run(scene())


def test_large_bodies_of_a_key_are_read_with_pauses_and_nobody_else_waits() -> None:
    async def scene() -> None:
        guard = guarded(lambda: asyncio.sleep(0), answers_in_progress=2)
        is_being_read, goes_on = asyncio.Event(), asyncio.Event()
        time_s = asyncio.get_running_loop().time

        async def of_unknown_length() -> AsyncIterator[bytes]:
            is_being_read.set()
            yield b'{"items": ["'
            await goes_on.wait()
            yield b"x" * 70_000 + b'"]}'

        async def end_s(name: str, **sent: Any) -> float:
            assert (await client_of(guard, name).post("/work", **sent)).status_code == 200
            return time_s()

        large = {"items": ["x" * 70_000]}
        slow = asyncio.create_task(end_s("anna", content=of_unknown_length()))
        await is_being_read.wait()
        began = time_s()
        await asyncio.sleep(0.3)
        await end_s("anna", json=WORK)
        for name in ("ben", "root", "root", "anna"):
            await end_s(name, json=large)
        assert not slow.done()
        took_s = time_s() - began
        goes_on.set()
        ended = await slow
        next_one = asyncio.create_task(end_s("anna", json=large))
        for name in ("ben", "root", "root"):
            await end_s(name, json=large)
        assert not next_one.done()
        assert await next_one - ended >= 0.75 * min(9 * took_s, 2.0)  # the pause began a moment before the answer came

    asyncio.run(scene())


def test_a_body_is_not_kept_beyond_its_limit_while_others_of_its_key_are_read() -> None:
    """What is sent is kept by Ray Serve until it is taken, however much that is."""

    async def scene() -> None:
        guard = guarded(lambda: asyncio.sleep(0), max_body_mib=1)
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                yield b" " * 65536
                sent += 65536

        async with client_of(guard, "anna") as anna, guard._share_of(KEYS[b"Bearer anna"]).large_body(0.0):
            async with asyncio.timeout(5):
                assert (await anna.post("/work", content=endless())).status_code == 413
        assert sent < 2 * 2**20

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
        with pytest.raises(RequestError, match="more than 100 values"):
            check_num_values(body, 100)


MIB_4 = 4 * 2**20 - 100


def test_bodies_full_of_values_hold_up_the_event_loop_less_than_reading_a_part_of_one_would() -> None:
    body = b'{"a": [' + b"[]," * (MIB_4 // 3) + b"1]}"
    part = b'{"a": [' + b"[]," * (MIB_4 // 12) + b"1]}"
    began = time.monotonic()
    parse_json(part)
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
