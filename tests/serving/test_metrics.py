"""What is counted, and that one scrape tells what all ingresses have counted: two of them in a real Ray Serve."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from serving.app import ENGINE_NAME, INGRESS_NAME, _engine_options
from serving.config import ServeConfig
from serving.feedback.keys import create_key
from serving.feedback.store import Store
from serving.feedback.transcript import Transcript
from serving.http.ingress import Ingress, ModelDeployments
from serving.http.metrics import FORM_REASONS, LOSS_REASONS, Metrics, exposition
from serving.http.routes.openai import with_usage, without_usage
from serving.http.scrape import ANSWER_S, GatheredMetrics, IngressMetrics, gather, page
from serving.registry.state import State
from serving.registry.versions import Registry
from serving.replica.engine_arguments import EngineSettings
from serving.schema import error_reply, event
from tests.processes import descendants
from tests.serving.fleet import MODEL, LightScoring, SpokenEngine, only_model
from tests.serving.tiny import whole

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text()
RULES = (ROOT / "configs" / "cluster" / "monitoring.yaml").read_text()
APP = "metrics"
COMPLETIONS = "/v1/completions"
TIMEOUT_S = 4.0
AT_ONCE = 2
"""Requests that the engine takes."""
Values = dict[tuple[str, ...], float]


@dataclass(frozen=True, kw_only=True)
class Running:
    """An endpoint with two ingresses."""

    url: str
    keys: dict[str, str]

    def ask(self, prompt: str, **more: Any) -> httpx.Response:
        return self.send("POST", COMPLETIONS, json={"model": MODEL, "prompt": prompt, **more})

    def send(self, method: str, path: str, *, role: str = "admin", **what: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys[role]}", **what.pop("headers", {})}
        return httpx.request(method, self.url + path, headers=headers, timeout=60, trust_env=False, **what)

    def scrape(self) -> Scraped:
        answer = self.send("GET", "/metrics", role="monitor")
        assert answer.status_code == 200, answer.text
        return Scraped(answer.text)

    def until(self, condition: Callable[[Scraped], bool]) -> Scraped:
        deadline = time.monotonic() + 60
        while not condition(scraped := self.scrape()):
            assert time.monotonic() < deadline, scraped.text
            time.sleep(0.1)
        return scraped


class Scraped:
    """One answer of `/metrics`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = [each for family in text_string_to_metric_families(text) for each in family.samples]

    def by(self, name: str, *labels: str, **wanted: str) -> Values:
        """Sums of a metric by some of its labels, over the samples that have these values."""
        sums: Values = defaultdict(float)
        for sample in self.samples:
            if sample.name == name and wanted.items() <= sample.labels.items():
                sums[tuple(sample.labels[label] for label in labels)] += sample.value
        return dict(sums)

    def sum(self, name: str, **wanted: str) -> float:
        return sum(self.by(name, **wanted).values())


@pytest.fixture(scope="module")
def running(light_ray: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("metrics")
    registry = Registry(folder / "registry")
    registry.add(whole(folder / "model"))
    registry.promote(1)
    database = f"sqlite:///{folder}/raylign.sqlite"
    with closing(Store(database)) as store:
        keys = {role: create_key(store, name=role, role=role) for role in ("monitor", "user", "admin")}  # type: ignore[arg-type]
    config = ServeConfig(
        checkpoint="model",
        name=MODEL,
        request_timeout_s=TIMEOUT_S,
        feedback={"database": database},  # type: ignore[arg-type]
        limits={"max_body_mib": 0.1, "answers_in_progress": 0},  # type: ignore[arg-type]
    )
    light: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_timeout_s": 1.0,
        "health_check_period_s": 0.5,
    }
    settings = EngineSettings(config=config, registry=str(registry.folder), device="cpu")
    router = _engine_options(config, "cpu")["request_router_config"]
    engine = serve.deployment(
        SpokenEngine, name=ENGINE_NAME, max_ongoing_requests=AT_ONCE, request_router_config=router, **light
    ).bind(settings)
    scoring = serve.deployment(LightScoring, name="scoring", **light).bind(0.0, 0.0)
    ingress = serve.deployment(
        serve.ingress()(Ingress), name=INGRESS_NAME, num_replicas=2, max_ongoing_requests=1000, **light
    )
    deployments = {MODEL: ModelDeployments(engine=engine, scoring=scoring, candidate=None)}
    app = ingress.bind(config, only_model(config, registry), "test/metrics", deployments)
    try:
        serve.run(app, name=APP, route_prefix="/")
        yield Running(url=f"http://127.0.0.1:{light_ray}", keys=keys)
    finally:
        serve.delete(APP)


def test_one_scrape_tells_what_both_ingresses_have_counted_whichever_is_asked(running: Running) -> None:
    asked = 0

    def has_both(scraped: Scraped) -> bool:
        return len(scraped.by("raylign_requests_total", "ingress", route=COMPLETIONS)) == 2

    while asked < 8 or not has_both(running.scrape()):
        assert running.ask("Hello").status_code == 200
        asked += 1
        assert asked < 200
    before: Values = {}
    for _ in range(10):
        scraped = running.scrape()
        assert scraped.sum("raylign_requests_total", route=COMPLETIONS, status="200", version="1") == asked
        assert scraped.by("raylign_ingresses") == {(): 2} and scraped.by("raylign_ingresses_unreachable") == {(): 0}
        after = scraped.by("raylign_requests_total", "ingress", "route", "status")
        assert before.items() <= {**after, **{key: min(value, after[key]) for key, value in before.items()}}.items()
        before = after
    assert scraped.sum("raylign_request_seconds_count", route=COMPLETIONS) == asked
    assert scraped.sum("raylign_version") == 1 and len(scraped.by("raylign_version")) == 1
    print(f"{asked} requests by ingress: {scraped.by('raylign_requests_total', 'ingress', route=COMPLETIONS)}")


def test_an_ingress_that_does_not_answer_is_counted_and_holds_a_scrape_up_for_a_second(running: Running) -> None:
    def gathered() -> tuple[GatheredMetrics, float]:
        begun = time.monotonic()
        handle = serve.get_deployment_handle(INGRESS_NAME, APP)
        return asyncio.run(gather(handle)), time.monotonic() - begun

    gathered()  # finds out which ingresses there are
    both, _ = gathered()
    assert len({answer.ingress for answer in both.answers}) == 2 and both.num_unreachable == 0
    stopped, _ = descendants(f"ServeReplica:{APP}:{INGRESS_NAME}", of=os.getpid())
    stopped.send_signal(signal.SIGSTOP)
    try:
        one, took_s = gathered()
    finally:
        stopped.send_signal(signal.SIGCONT)
    print(f"one of two in {took_s:.2f} s")
    assert len(one.answers) == 1 and one.num_unreachable == 1
    assert took_s < ANSWER_S + 1
    again, _ = gathered()
    assert {answer.ingress for answer in again.answers} == {answer.ingress for answer in both.answers}


def test_refusals_are_counted_by_route_and_never_by_what_a_client_sends(running: Running) -> None:
    before = running.scrape()
    body = {"model": MODEL, "prompt": "Hello"}
    refused = [
        (running.send("POST", COMPLETIONS, json=body, headers={"authorization": "Bearer SECRET"}), 401, COMPLETIONS),
        (running.send("GET", "/v1/admin/versions", role="user"), 403, "/v1/admin/versions"),
        (running.send("DELETE", "/v1/records/SECRET", json={}, role="user"), 403, "/v1/records/{id}"),
        (running.send("GET", "/metrics", role="user"), 403, "/metrics"),
        (running.send("GET", "/v1/models", role="monitor"), 403, "/v1/models"),
        (running.send("GET", "/SECRET"), 404, "none"),
        (running.send("GET", "/v1/models/SECRET"), 404, "/v1/models/{name:path}"),
        (running.send("POST", COMPLETIONS, json={**body, "max_tokens": -1}), 400, COMPLETIONS),
        (
            running.send("POST", COMPLETIONS, content=b"{", headers={"content-type": "application/json"}),
            400,
            COMPLETIONS,
        ),
        (running.send("POST", COMPLETIONS, json={**body, "prompt": "x" * 200_000}), 413, COMPLETIONS),
        (running.send("POST", COMPLETIONS, content=b"{}"), 415, COMPLETIONS),
        (running.send("PUT", COMPLETIONS, json={}), 405, COMPLETIONS),
    ]
    after = running.scrape()
    expected: Values = defaultdict(float)
    for answer, status, route in refused:
        assert answer.status_code == status, answer.text
        expected[route, str(status)] += 1
    rises = {
        key: value - before.by("raylign_requests_total", "route", "status").get(key, 0)
        for key, value in after.by("raylign_requests_total", "route", "status").items()
    }
    assert {key: rise for key, rise in rises.items() if key[1] != "200"} == expected
    assert "SECRET" not in after.text
    failures = ("raylign_request_seconds_count", COMPLETIONS)
    assert after.sum(failures[0], route=failures[1]) == before.sum(failures[0], route=failures[1])


def test_streams_that_break_off_are_counted_by_what_broke_them(running: Running) -> None:
    before = running.scrape()
    assert running.ask("Hello", stream=True).text.endswith("data: [DONE]\n\n")
    assert "failed" in running.ask("fail", stream=True).text
    assert "not complete after" in running.ask("wait", stream=True).text
    headers = {"authorization": f"Bearer {running.keys['user']}"}
    body = {"model": MODEL, "prompt": "wait", "stream": True}
    with httpx.stream("POST", running.url + COMPLETIONS, json=body, headers=headers, trust_env=False) as stream:
        next(stream.iter_lines())
    assert "is gone" in running.ask("die", stream=True).text

    def broken(scraped: Scraped) -> Values:
        return scraped.by("raylign_streams_broken_total", "route", "version", "reason")

    reasons = ("client", "deadline", "engine", "replica")
    scraped = running.until(lambda scraped: len(broken(scraped)) == len(reasons))
    assert broken(scraped) == {(COMPLETIONS, "1", reason): 1.0 for reason in reasons}
    assert not broken(before)
    name, wanted = "raylign_first_token_seconds_count", {"route": COMPLETIONS, "version": "1"}
    assert scraped.sum(name, **wanted) - before.sum(name, **wanted) == 5


def test_tokens_are_counted_also_of_streams_whose_clients_do_not_ask_for_them(running: Running) -> None:
    def tokens(scraped: Scraped) -> tuple[float, float]:
        return scraped.sum("raylign_prompt_tokens_total", version="1"), scraped.sum(
            "raylign_completion_tokens_total", version="1"
        )

    before = tokens(running.until(lambda scraped: running.ask("Hello").status_code == 200))
    silent = running.ask("Hello", stream=True).text
    spoken = running.ask("Hello", stream=True, stream_options={"include_usage": True}).text
    after = tokens(running.scrape())
    assert "usage" not in silent and silent.endswith("data: [DONE]\n\n")
    assert spoken.count('"usage":{"prompt_tokens":3,') == 1
    assert (after[0] - before[0], after[1] - before[1]) == (9, 6), "one before the first scrape was counted"


def test_what_is_in_progress_and_what_waits_for_an_engine_is_seen_while_it_does(running: Running) -> None:
    late = {"route": COMPLETIONS, "status": "504"}
    before = running.scrape().sum("raylign_requests_total", **late)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(running.ask, "wait") for _ in range(AT_ONCE + 3)]
        scraped = running.until(lambda scraped: scraped.sum("raylign_requests_waiting", on="engine") == 3)
        assert scraped.sum("raylign_requests_in_progress", route=COMPLETIONS) == AT_ONCE + 3
        assert {answer.result().status_code for answer in answers} == {504}
    scraped = running.until(lambda scraped: scraped.sum("raylign_requests_waiting", on="engine") == 0)
    assert scraped.sum("raylign_requests_in_progress", route=COMPLETIONS) == 0
    assert scraped.sum("raylign_requests_total", **late) - before == AT_ONCE + 3


def filled() -> Scraped:
    """A scrape in which every metric has a sample."""
    metrics = Metrics()
    metrics.track_waiting("engine", lambda: 3)
    with metrics.in_progress(COMPLETIONS):
        metrics.count_request(COMPLETIONS, method="POST", status=200, version="1", seconds=1.0)
        metrics.observe_first_token(COMPLETIONS, "1", 0.1)
        metrics.count_broken_stream(COMPLETIONS, version="1", reason="client")
        metrics.count_tokens("1", {"prompt_tokens": 1, "completion_tokens": None})
        metrics.count_scored(1, 2)
        metrics.observe("key", 0.1)
        own = IngressMetrics(ingress="one", metrics=metrics.collect())
        gathered = GatheredMetrics(answers=(), num_unreachable=0)
        state = State(current=1, canary=2, share=0.1)
        return Scraped(exposition(page(own, gathered, {MODEL: state}, records_waiting=0, audit_waiting=0)).decode())


def test_the_page_has_every_metric_with_its_type_labels_and_meaning() -> None:
    exposed = {}
    for family in text_string_to_metric_families(filled().text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = set().union(*(sample.labels for sample in family.samples)) - {"le"}
        exposed[name] = (family.type, labels, family.documentation)
    rows = re.findall(r"^\| `(raylign_\w+)` \| (\w+) \| (.*?) ?\| (.+) \|$", PAGE, re.MULTILINE)
    told = {name: (kind, set(re.findall(r"`(\w+)`", labels)), meaning) for name, kind, labels, meaning in rows}
    assert {name: row[:2] for name, row in told.items()} == {name: row[:2] for name, row in exposed.items()}
    assert [name for name, row in exposed.items() if not told[name][2].startswith(row[2])] == []


def test_questions_and_alarms_are_about_metrics_that_there_are() -> None:
    names = {sample.name for sample in filled().samples}
    assert set(re.findall(r"raylign_\w+", PAGE + RULES)) <= names | {
        "raylign_request_seconds",
        "raylign_first_token_seconds",
        "raylign_part_seconds",
    }
    alarms = re.findall(r"- alert: (\w+)", RULES)
    assert re.findall(r"^\| (Raylign\w+) \|", PAGE, re.MULTILINE) == alarms and alarms


def test_an_alarm_that_was_never_rung_is_there_at_zero() -> None:
    scraped = Scraped(exposition(Metrics().collect()).decode())
    assert scraped.by("raylign_records_lost_total", "reason") == {(reason,): 0 for reason in LOSS_REASONS}
    assert scraped.by("raylign_forms_refused_total", "reason") == {(reason,): 0 for reason in FORM_REASONS}
    assert scraped.by("raylign_audit_lost_total") == {(): 0}


USAGE = '{"id":"a","model":"m","choices":[],"usage":{"prompt_tokens":3}}'


@pytest.mark.parametrize(
    ("options", "sent", "changed"),
    [
        ({"stream": True}, {"include_usage": True, "continuous_usage_stats": False}, True),
        ({"stream": True, "stream_options": None}, {"include_usage": True, "continuous_usage_stats": False}, True),
        (
            {"stream": True, "stream_options": {"include_usage": False, "continuous_usage_stats": True}},
            {"include_usage": True, "continuous_usage_stats": False},
            True,
        ),
        ({"stream": True, "stream_options": {"include_usage": True}}, {"include_usage": True}, False),
        ({"stream": True, "stream_options": "x"}, "x", False),
        ({"stream": False}, None, False),
    ],
)
def test_the_engine_is_asked_to_count_the_tokens_of_every_stream(
    options: dict[str, Any], sent: Any, changed: bool
) -> None:
    asked = {"model": MODEL, **options}
    assert with_usage(asked).get("stream_options") == sent
    assert (with_usage(asked) is not asked) == changed


def test_the_count_is_taken_out_of_a_stream_wherever_it_stands() -> None:
    first, done = 'data: {"choices":[{"text":"\\"choices\\":[],\u2028"}]}\n\n', "data: [DONE]\n\n"
    for before in ("", first):
        for after in ("", done):
            assert without_usage(f"{before}data: {USAGE}\n\n{after}") == before + after
    assert without_usage(first) == first


def test_a_transcript_knows_how_many_tokens_there_were_and_what_went_wrong() -> None:
    said = Transcript({"prompt": "a"}, keeps_texts=False)
    said.add_events(f"data: {USAGE}\n\ndata: [DONE]\n\n")
    assert (said.usage, said.error, said.problem) == ({"prompt_tokens": 3}, None, None)
    said.add_events(event(error_reply(504, "late")))
    assert said.error == "timeout"
