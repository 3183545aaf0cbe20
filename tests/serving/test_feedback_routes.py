"""What people say, over HTTP to the real service: it arrives once, and comes back as training rows."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from alignment.data.shapes import to_group
from alignment.data.sources import read_rows
from alignment.settings.data import SourceConfig
from serving.http.routes.feedback import EngineAnswer, comparable_answers
from tests.serving.conftest import ALIGNED, MAX_TOKENS, Running

TURNS = [{"role": "user", "content": "Name a colour."}]


def chat(endpoint: Running, **more: Any) -> Any:
    body = {"model": ALIGNED, "messages": TURNS, "max_tokens": 8, **more}
    answer = endpoint.ask("POST", "/v1/chat/completions", body, role="user")
    assert answer.status_code == 200, answer.text
    return answer


def judge(endpoint: Running, status: int = 200, key: str | None = None, **body: Any) -> Any:
    headers = {"idempotency_key": key} if key else {}
    answer = endpoint.ask("POST", "/v1/feedback", body, role="labeller", **headers)
    assert answer.status_code == status, answer.text
    return answer.json()


def compared(endpoint: Running) -> Any:
    """Two answers: a random adapter's twelve tokens are never twice the same, and if so they are drawn again."""
    body = {"messages": TURNS, "max_tokens": 12, "temperature": 1.5}
    answer = endpoint.ask("POST", "/v1/comparisons", body, role="labeller")
    assert answer.status_code == 200, answer.text
    return answer.json()


def exported(endpoint: Running) -> list[dict[str, Any]]:
    answer = endpoint.ask("GET", "/v1/feedback/export")
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_choice_becomes_a_pair_to_train_on(endpoint: Running) -> None:
    asked = compared(endpoint)
    first, second = asked["answers"]
    assert first["text"] != second["text"]
    receipt = judge(endpoint, kind="choice", id=asked["id"], winner=second["id"])
    row = next(row for row in exported(endpoint) if row["id"] == receipt["id"])
    rewards = dict(zip(row["completions"], row["rewards"], strict=True))
    assert rewards == {first["text"]: 0, second["text"]: 1}
    assert row["prompt"] == TURNS
    group = to_group(row, "row", SourceConfig(path="-"))
    assert len(group.pairs) == 1


@pytest.mark.parametrize(
    ("drawn", "shown"),
    [
        (["a b"], "a b"),
        (["a a", "b c"], "b c"),
        ([" a", "b ", "c d"], "c d"),
        (["a a", "\n b", "c c", "d e"], "c c"),
    ],
    ids=["both are good", "the same twice", "one is blank", "it is tried thrice"],
)
def test_what_a_choice_teaches_nothing_about_is_drawn_again(drawn: list[str], shown: str) -> None:
    draws = iter(drawn)

    async def draw() -> list[EngineAnswer]:
        return [EngineAnswer(text=text, version=1, finish_reason="stop") for text in next(draws).split(" ")]

    assert " ".join(said.text for said in asyncio.run(comparable_answers(draw))) == shown


def test_versions_are_not_told_before_the_choice(endpoint: Running) -> None:
    asked = compared(endpoint)
    assert set(asked) == {"id", "object", "answers"}
    assert all(set(answer) == {"id", "text"} for answer in asked["answers"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_of_a_chat_can_be_judged_at_once(endpoint: Running, stream: bool) -> None:
    answer = chat(endpoint, stream=stream, temperature=0)
    text = answer.text.split("\n")[0].removeprefix("data: ") if stream else answer.text
    id = json.loads(text)["id"]
    receipt = judge(endpoint, kind="thumb", id=id, up=False)
    row = next(row for row in exported(endpoint) if row["id"] == receipt["id"])
    assert row["rewards"] == [0] and row["prompt"] == TURNS
    assert row["versions"] == [1]
    if not stream:
        assert row["completions"] == [json.loads(answer.text)["choices"][0]["message"]["content"]]


def test_a_ranking_and_a_correction_are_groups_too(endpoint: Running) -> None:
    answer = chat(endpoint, n=3, temperature=1.5, seed=3).json()
    ids = [f"{answer['id']}-{index}" for index in (2, 0, 1)]
    ranked = judge(endpoint, kind="ranking", id=answer["id"], order=ids)
    corrected = judge(endpoint, kind="correction", id=ids[0], text="Blue.")
    rows = {row["id"]: row for row in exported(endpoint)}
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert dict(zip(rows[ranked["id"]]["completions"], rows[ranked["id"]]["rewards"], strict=True)) == {
        texts[2]: 1.0,
        texts[0]: 0.5,
        texts[1]: 0.0,
    }
    assert dict(zip(rows[corrected["id"]]["completions"], rows[corrected["id"]]["rewards"], strict=True)) == {
        texts[2]: 0,
        "Blue.": 1,
    }


def test_saying_the_same_twice_counts_once(endpoint: Running) -> None:
    asked = compared(endpoint)
    said = {"kind": "choice", "id": asked["id"], "winner": "tie"}
    first = judge(endpoint, **said)
    assert judge(endpoint, **said) == first
    keyed = judge(endpoint, key="abc", kind="choice", id=asked["id"], winner="both_bad")
    assert keyed["replaces"] == first["id"]
    assert judge(endpoint, key="abc", kind="choice", id=asked["id"], winner="both_bad") == keyed
    judge(endpoint, 409, key="abc", kind="choice", id=asked["id"], winner="tie")
    assert [row["id"] for row in exported(endpoint) if row["id"] in (first["id"], keyed["id"])] == [keyed["id"]]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"kind": "thumb", "id": "chatcmpl-none", "up": True}, 404),
        ({"kind": "thumb", "id": "../../etc/passwd", "up": True}, 404),
        ({"kind": "thumb", "id": "'; DROP TABLE answers; --", "up": True}, 404),
        ({"kind": "thumb", "id": "x"}, 400),
        ({"kind": "thumb", "id": "x", "up": "yes"}, 400),
        ({"kind": "choice", "id": "x", "winner": "tie", "up": True}, 400),
        ({"kind": "like", "id": "x"}, 400),
        ({"kind": "correction", "id": "x", "text": "y" * 120_000}, 413),
    ],
)
def test_what_makes_no_sense_is_refused(endpoint: Running, body: dict[str, Any], status: int) -> None:
    judge(endpoint, status, **body)


@pytest.mark.parametrize("index", ["-2", "-00", "-01", "-999999999"])
def test_an_index_that_an_answer_does_not_have_is_named_at_once(endpoint: Running, index: str) -> None:
    answer = chat(endpoint, n=2, temperature=1.5, seed=3).json()
    judge(endpoint, kind="thumb", id=f"{answer['id']}-1", up=True)
    body = {"kind": "thumb", "id": answer["id"] + index, "up": True}
    refused = endpoint.ask("POST", "/v1/feedback", body, role="labeller")
    assert refused.status_code == 404 and f"{answer['id']}-0, {answer['id']}-1" in refused.text, refused.text


def test_feedback_on_an_answer_that_was_cut_off_says_so(endpoint: Running) -> None:
    messages = [{"role": "user", "content": "Tell a long story."}]
    stream = endpoint.client.chat.completions.create(
        model=ALIGNED, messages=messages, max_tokens=MAX_TOKENS, stream=True, extra_body={"ignore_eos": True}
    )
    id = next(iter(stream)).id
    stream.close()
    body = {"kind": "thumb", "id": id, "up": True}
    deadline = time.monotonic() + 10
    while (refused := endpoint.ask("POST", "/v1/feedback", body, role="labeller")).status_code == 503:
        assert time.monotonic() < deadline, "the stream has ended"
        time.sleep(0.1)
    assert refused.status_code == 404 and "cut off" in refused.text, refused.text


def test_an_export_after_a_judgement_that_there_is_not_is_refused(endpoint: Running) -> None:
    assert endpoint.ask("GET", "/v1/feedback/export?since=cmp-1").status_code == 404


def test_a_name_in_a_query_that_nothing_reads_is_refused(endpoint: Running) -> None:
    for path in ("/v1/feedback/export?foo=1", "/v1/feedback/statistics?limit=1", "/v1/admin/versions?version=1"):
        refused = endpoint.ask("GET", path)
        assert refused.status_code == 400 and "Unknown parameter" in refused.text, refused.text
    assert endpoint.ask("GET", f"/v1/feedback/export?limit=1&model={ALIGNED}").status_code == 200
    assert endpoint.ask("GET", "/v1/models?api-version=1").status_code == 200


def test_statistics_count_what_was_said(endpoint: Running) -> None:
    before = endpoint.ask("GET", "/v1/feedback/statistics", role="labeller").json()
    asked = compared(endpoint)
    judge(endpoint, kind="choice", id=asked["id"], winner=asked["answers"][0]["id"])
    after = endpoint.ask("GET", "/v1/feedback/statistics", role="labeller").json()
    assert after["comparisons"] == before["comparisons"] + 1
    assert after["judged"] == before["judged"] + 1
    assert after["by_labeller"]["the-labeller"] == before["by_labeller"].get("the-labeller", 0) + 1


def test_what_is_deleted_is_gone(endpoint: Running) -> None:
    asked = compared(endpoint)
    receipt = judge(endpoint, kind="choice", id=asked["id"], winner="tie")
    assert endpoint.ask("DELETE", f"/v1/records/{asked['id']}").json()["deleted"] >= 1
    assert receipt["id"] not in {row["id"] for row in exported(endpoint)}
    judge(endpoint, 404, kind="choice", id=asked["id"], winner="tie")


def test_training_reads_the_database_and_the_export_alike(
    endpoint: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = compared(endpoint)
    judge(endpoint, kind="choice", id=asked["id"], winner=asked["answers"][0]["id"])
    monkeypatch.setenv("RAYLIGN_KEY", endpoint.keys["admin"])
    by_http = [row for _, row in read_rows(SourceConfig(path=f"{endpoint.url}/v1/feedback/export"))]
    by_database = [row for _, row in read_rows(SourceConfig(path=endpoint.database))]
    assert by_http == exported(endpoint)
    assert by_database == [{name: value for name, value in row.items() if name != "id"} for row in by_http]


@pytest.mark.parametrize(
    ("role", "method", "path", "body"),
    [
        ("user", "POST", "/v1/comparisons", {"messages": TURNS}),
        ("user", "POST", "/v1/feedback", {"kind": "thumb", "id": "x", "up": True}),
        ("labeller", "GET", "/v1/feedback/export", None),
        ("labeller", "GET", "/v1/admin/versions", None),
        ("labeller", "POST", "/v1/admin/rollback", {}),
        ("labeller", "GET", "/metrics", None),
    ],
)
def test_a_key_may_only_what_its_role_may(
    endpoint: Running, role: str, method: str, path: str, body: dict[str, Any] | None
) -> None:
    assert endpoint.ask(method, path, body, role=role).status_code == 403
