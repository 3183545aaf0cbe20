"""Two models behind one endpoint, in a real Ray Serve: what is asked of one concerns the other in nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from alignment.data.sources import read_rows
from alignment.errors import ServingError
from alignment.settings.data import SourceConfig
from serving import app
from serving.config import ServeConfig
from serving.feedback.keys import create_key
from serving.feedback.store import Store
from serving.registry.models import publish_models
from serving.registry.promote import promote, rollback, versions
from serving.start import StartingEndpoint, deploy
from tests.serving.fleet import NamedCandidate, NamedEngine, VersionScoring
from tests.serving.tiny import whole

NAMES = ["assistant", "coder"]
CONVERSATIONS = 40


@dataclass(frozen=True, kw_only=True)
class TwoModels:
    """An endpoint that serves `assistant` and `coder`."""

    config: ServeConfig
    key: str
    folder: Path
    failures: dict[str, str]

    def send(
        self, method: str, path: str, body: Any = None, *, timeout_s: float = 120.0, **parameters: str
    ) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        url = self.config.url + path
        return httpx.request(method, url, json=body, params=parameters, headers=headers, timeout=timeout_s)

    def complete(self, model: str, prompt: str = "Hello") -> httpx.Response:
        return self.send("POST", "/v1/completions", {"model": model, "prompt": prompt})

    def text(self, model: str, prompt: str = "Hello") -> str:
        answer = self.complete(model, prompt)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        assert text.split() == [model, answer.headers["x-model-version"]]
        return text

    def register(self, model: str, seed: int) -> int:
        """Adds a version to a model."""
        checkpoint = str(whole(self.folder / f"checkpoint-{model}-{seed}", seed=seed))
        answer = self.send("POST", "/v1/admin/versions", {"checkpoint": checkpoint}, model=model)
        assert answer.status_code == 200, answer.text
        number: int = answer.json()["number"]
        return number

    def current(self, model: str) -> int:
        number: int = self.send("GET", "/v1/admin/versions", model=model).json()["state"]["current"]
        return number


@contextmanager
def endpoint(folder: Path, port: int, *, prepare: Callable[[Path], object] = lambda _: None) -> Iterator[TwoModels]:
    """The endpoint, until the block ends.

    Args:
        prepare: is called with the folder of the coder's registry before anything starts.
    """
    config = ServeConfig(
        checkpoint=str(whole(folder / "assistant", seed=100)),
        name="assistant",
        folder=str(folder / "serving"),
        port=port,
        device="cpu",
        request_timeout_s=60.0,
        drain_timeout_s=1.0,
        limits={"answers_in_progress": 64},  # type: ignore[arg-type]
        feedback={"record": True},  # type: ignore[arg-type]
        models={"coder": {"checkpoint": str(whole(folder / "coder", seed=200)), "max_num_seqs": 8}},  # type: ignore[dict-item]
    )
    models = publish_models(config).models
    prepare(models["coder"].registry.folder)
    with closing(Store(f"sqlite:///{models.first.registry.folder}/feedback.sqlite")) as store:
        key = create_key(store, name="anna", role="admin")
    starting = StartingEndpoint(
        deployment_names={name: app.deployment_names(models, name) for name in models},
        min_replicas=dict.fromkeys(models, 1),
        health_url=f"{config.url}/healthz",
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, light in (("Engine", NamedEngine), ("CandidateEngine", NamedCandidate), ("Scoring", VersionScoring)):
            patch.setattr(app, name, light)
        target = app.application(config, models, "test/two")
    try:
        deploy(target, "two", starting)
        failures = {str(name): reason for name, reason in starting.failures.items()}
        yield TwoModels(config=config, key=key, folder=folder, failures=failures)
    finally:
        serve.delete("two")


@pytest.fixture(scope="module")
def two(light_ray: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoModels]:
    with endpoint(tmp_path_factory.mktemp("two"), light_ray) as models:
        yield models


@pytest.fixture(autouse=True)
def _key(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "two" in request.fixturenames:
        monkeypatch.setenv("RAYLIGN_KEY", request.getfixturevalue("two").key)


def message(answer: httpx.Response) -> str:
    text: str = answer.json()["error"]["message"]
    return text


def test_a_request_is_answered_by_the_model_that_it_names(two: TwoModels) -> None:
    assert two.text("assistant").startswith("assistant ") and two.text("coder").startswith("coder ")
    models = two.send("GET", "/v1/models").json()["data"]
    assert [(model["id"], model["parent"], model["max_model_len"]) for model in models] == [
        ("assistant", None, 512),
        ("coder", None, 512),
    ]
    assert two.send("GET", "/v1/models/coder").json()["id"] == "coder"
    for answer in (two.complete("base"), two.send("GET", "/v1/models/base")):
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
        assert message(answer) == "There is no model 'base' here; there are assistant, coder."


def test_both_are_ready_and_each_is_asked_for_by_its_name(two: TwoModels) -> None:
    assert two.failures == {}
    assert two.send("GET", "/readyz").json() == {"status": "ready"}
    assert [two.send("GET", "/readyz", model=name).status_code for name in (*NAMES, "base")] == [200, 200, 404]


def test_the_routes_to_versions_are_told_which_model_is_meant(two: TwoModels) -> None:
    for method, path, body in (
        ("GET", "/v1/admin/versions", None),
        ("POST", "/v1/admin/versions", {"checkpoint": "x"}),
        ("DELETE", "/v1/admin/versions/1", None),
        ("POST", "/v1/admin/promote", {"version": 1}),
        ("POST", "/v1/admin/rollback", {}),
        ("DELETE", "/v1/admin/canary", None),
        ("GET", "/v1/feedback/statistics", None),
        ("POST", "/v1/rewards", {"items": [{"prompt": "a", "completions": ["b"]}]}),
        ("POST", "/v1/comparisons", {"prompt": "a"}),
    ):
        answer = two.send(method, path, body)
        assert answer.status_code == 400, (path, answer.text)
        assert message(answer) == "There are several models here, so model has to name one of assistant, coder."
        assert answer.json()["error"]["param"] == "model"
    assert two.send("GET", "/v1/admin/versions", model="base").status_code == 404
    with pytest.raises(ServingError, match=r"model has to name one of assistant, coder\. \(HTTP status 400\)"):
        versions(url=two.config.url)


def test_a_promotion_and_a_rollback_of_one_leave_the_other(two: TwoModels, capsys: pytest.CaptureFixture[str]) -> None:
    before = two.current("assistant")
    number = two.register("coder", seed=201)
    assert two.text("coder") == "coder 1"
    promote(str(number), url=two.config.url, model="coder")
    assert "`raylign rollback --model coder` undoes it" in capsys.readouterr().out
    assert (two.text("coder"), two.text("assistant")) == (f"coder {number}", f"assistant {before}")
    rollback(url=two.config.url, model="coder")
    assert two.text("coder") == "coder 1" and two.current("assistant") == before
    versions(url=two.config.url, model="assistant")
    listed = capsys.readouterr().out
    assert str(two.folder / "assistant") in listed and "checkpoint-coder" not in listed


def test_a_canary_of_one_answers_no_request_for_the_other(two: TwoModels) -> None:
    number, before = two.register("coder", seed=202), two.text("assistant")
    answer = two.send("POST", "/v1/admin/promote", {"version": number, "canary": 0.5}, model="coder")
    assert answer.status_code == 200, answer.text
    try:
        prompts = [f"conversation {index}" for index in range(CONVERSATIONS)]
        with ThreadPoolExecutor(4) as pool:
            texts = {name: set(pool.map(lambda prompt, name=name: two.text(name, prompt), prompts)) for name in NAMES}
        assert texts == {"assistant": {before}, "coder": {"coder 1", f"coder {number}"}}
        metrics = two.send("GET", "/metrics").text
        shares = [line for line in metrics.splitlines() if line.startswith("raylign_canary_share{")]
        assert shares == [f'raylign_canary_share{{model="coder",version="{number}"}} 0.5']
    finally:
        assert two.send("DELETE", "/v1/admin/canary", model="coder").status_code == 200


def test_a_gate_compares_versions_of_the_named_model(
    two: TwoModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, gate = tmp_path / "rows.jsonl", tmp_path / "gate.yaml"
    rows.write_text('{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}\n')
    gate.write_text(f"data: {{path: {rows}}}\nmargins: {{accuracy: 1.0}}\n")
    number, before = two.register("coder", seed=203), two.current("coder")
    promote(str(number), url=two.config.url, model="coder", gate=gate, dry_run=True)
    printed = capsys.readouterr().out
    assert f"version {before}  version {number}" in printed and "may be promoted" in printed
    state = two.send("GET", "/v1/admin/versions", model="coder").json()["state"]
    assert (state["current"], state["canary"]) == (before, None)


def test_a_deleted_version_is_that_of_one_model(two: TwoModels) -> None:
    numbers = {name: two.register(name, seed=300) for name in NAMES}
    versions(action=["delete", str(numbers["coder"])], url=two.config.url, model="coder")
    kept = {
        name: [version["number"] for version in two.send("GET", "/v1/admin/versions", model=name).json()["versions"]]
        for name in NAMES
    }
    assert numbers["assistant"] in kept["assistant"] and numbers["coder"] not in kept["coder"]


def test_feedback_says_which_model_it_is_about(two: TwoModels) -> None:
    for name, up in (("assistant", True), ("coder", False), ("coder", True)):
        answer = two.complete(name, f"What is {name}?").json()
        thumb = {"kind": "thumb", "id": answer["id"], "up": up}
        assert two.send("POST", "/v1/feedback", thumb).status_code == 200
    rows = [json.loads(line) for line in two.send("GET", "/v1/feedback/export").text.splitlines()]
    assert [(row["model"], row["rewards"]) for row in rows] == [
        ("assistant", [1.0]),
        ("coder", [0.0]),
        ("coder", [1.0]),
    ]
    export = f"{two.config.url}/v1/feedback/export?model=coder"
    read = [row for _, row in read_rows(SourceConfig(path=export))]
    assert [row["prompt"] for row in read if isinstance(row, dict)] == ["What is coder?"] * 2
    counted = {name: two.send("GET", "/v1/feedback/statistics", model=name).json() for name in NAMES}
    assert [counted[name]["by_kind"] for name in NAMES] == [{"thumb": 1}, {"thumb": 2}]
    assert two.send("GET", "/v1/feedback/export", model="base").status_code == 404


def test_a_comparison_and_rewards_are_of_the_named_model(two: TwoModels) -> None:
    number = two.current("assistant")
    answer = two.send("POST", "/v1/comparisons", {"prompt": "Which?", "model": "assistant"})
    assert answer.status_code == 200, answer.text
    assert {entry["text"] for entry in answer.json()["answers"]} == {f"assistant {number}"}
    for name in NAMES:
        body = {"model": name, "items": [{"prompt": "a", "completions": ["b"]}]}
        rewards = two.send("POST", "/v1/rewards", body).json()
        assert (rewards["model"], rewards["items"][0]["rewards"]) == (name, [float(two.current(name))])
    other = two.send("POST", "/v1/rewards", {"model": "base", "items": []})
    assert (other.status_code, message(other)) == (404, "Rewards are those of assistant and coder.")


def test_what_happens_is_counted_by_model(two: TwoModels) -> None:
    for name in NAMES:
        two.text(name)
    metrics = two.send("GET", "/metrics").text.splitlines()
    for name in NAMES:
        assert f'raylign_version{{model="{name}"}} {float(two.current(name))}' in metrics
        assert any(
            line.startswith("raylign_completion_tokens_total{") and f'model="{name}"' in line for line in metrics
        )


def test_when_the_replicas_of_one_are_gone_the_other_answers(two: TwoModels) -> None:
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(two.text, "assistant", "wait")
        time.sleep(0.5)
        died = two.complete("coder", "die")
        assert died.status_code == 503 and "is gone" in message(died)
        assert two.text("assistant").startswith("assistant ")
        assert waiting.result().startswith("assistant "), "what the other model was answering has been answered"
    assert two.text("coder") == "coder 1", "Ray Serve started another replica"


def when_given_up(models: TwoModels) -> httpx.Response:
    """What a request for the coder gets once Ray Serve starts its engine no more; before, requests wait for a start."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(httpx.ReadTimeout):
            return models.send("POST", "/v1/completions", {"model": "coder", "prompt": "Hello"}, timeout_s=3.0)
    pytest.fail("Ray Serve did not give the engine up")


def test_an_engine_that_does_not_start_leaves_the_other_model(
    light_ray: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve.delete("two")  # the only endpoint of a port
    with endpoint(tmp_path, light_ray, prepare=lambda folder: (folder / "no-engine").touch()) as alone:
        assert alone.failures == {"coder": "vLLM does not start with this model: there is no room"}
        assert "coder does not start; the endpoint goes on without it. vLLM does not start" in capsys.readouterr().out
        assert alone.text("assistant") == "assistant 1"
        assert alone.send("GET", "/readyz").status_code == 200
        assert message(when_given_up(alone)) == "The model is not available. Try again later."
        assert alone.send("GET", "/readyz", model="coder").status_code == 503
        assert [model["id"] for model in alone.send("GET", "/v1/models").json()["data"]] == NAMES
