"""The gate: what two versions are worth, measured over HTTP, and by how much one may be worse than the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import ConfigError, DataError, RewardError, ServingError
from alignment.settings.load import check_config
from serving.registry.client import EndpointClient
from serving.registry.gate import (
    Figures,
    GateConfig,
    GateResult,
    Margins,
    compare,
    evaluate_versions,
    held_out,
    load_gate,
)
from serving.registry.versions import Registry
from tests.serving.standin import MODEL, Standin, broken, running
from tests.serving.tiny import adapter

ROOT = Path(__file__).parents[2]
ROWS = [
    {"prompt": "2 + 2?", "chosen": "It is 4.", "rejected": "It is 5.", "keywords": ["4"]},
    {"prompt": "Capital of France?", "chosen": "Paris", "rejected": "Rome", "keywords": ["Paris"]},
]
SAME: Figures = {
    "accuracy": 0.9,
    "reward": 0.5,
    "eval_rewards/keywords": 0.5,
    "length": 40.0,
    "truncated": 0.1,
    "kl": 10.0,
}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Standin]:
    """Version 1 answers rightly and at length; version 2, beside it, answers shortly, and half of it wrongly."""
    registry = Registry(tmp_path / "registry")
    for seed in (1, 2):
        registry.add(adapter(tmp_path / f"adapter-{seed}", seed=seed))
    registry.promote(1)
    registry.canary(2, 0.0)
    with running(registry) as standin:
        standin.says = {
            1: lambda prompt: "The answer is 4 or Paris …",
            2: lambda prompt: "Rome" if "C" in prompt else "4",
        }
        standin.prefers = {1: lambda text: {"It is 4.": 2.0, "It is 5.": 2.0}.get(text, len(text) / 10), 2: len}
        yield standin


def gate(write_rows: Any, rows: list[dict[str, Any]] | None = None, **settings: Any) -> GateConfig:
    data = {"path": str(write_rows(ROWS if rows is None else rows)), "keep": ["keywords"], "prompt_as": "user_message"}
    known = {"data": data, "eval_rewards": [{"name": "keywords"}], "margins": {"max_kl": 60}}
    return check_config({**known, **settings}, kind=GateConfig)


def figures(config: GateConfig, standin: Standin, versions: tuple[int, ...] = (1, 2)) -> list[Figures]:
    with EndpointClient(standin.url, timeout_s=10) as service:
        return evaluate_versions(config, service, versions)


def names(result: GateResult) -> list[str]:
    """Of the figures that did not pass."""
    return [line.name for line in result.lines if not line.passes]


def test_figures_are_means_over_prompts_pairs_and_answers(service: Standin, write_rows: Any) -> None:
    current, candidate = figures(gate(write_rows), service)
    # Version 1 gives the first pair a tie, and to "Paris" 0.5 × 0.5 against 0.5 × 0.4; its answer has 26 characters.
    assert current == pytest.approx(
        {"accuracy": 0.75, "reward": 1.0, "eval_rewards/keywords": 1.0, "length": 7, "truncated": 1.0, "kl": 2.6}
    )
    # Version 2 has log-ratios of 8 and 8, 5 and 4 for the pairs, and of 1 and 4 for its own answers.
    assert candidate == pytest.approx(
        {"accuracy": 0.75, "reward": 0.5, "eval_rewards/keywords": 0.5, "length": 1, "truncated": 0.0, "kl": 2.5}
    )


def test_both_versions_are_asked_the_same_greedily_and_by_number(service: Standin, write_rows: Any) -> None:
    figures(gate(write_rows, max_tokens=33), service)
    asked = [body for body in service.asked if body["path"] == "/v1/chat/completions"]
    assert len(asked) == 4
    for body in asked:
        assert (body["model"], body["temperature"], body["max_tokens"]) == (MODEL, 0, 33)
    for row in ROWS:
        messages = [{"role": "user", "content": row["prompt"]}]
        assert sorted(body["version"] for body in asked if body["messages"] == messages) == [1, 2]


def test_plain_prompts_are_continued(service: Standin, write_rows: Any) -> None:
    rows = [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}]
    config = gate(write_rows, rows, data={"path": str(write_rows(rows))}, eval_rewards=[])
    assert set(figures(config, service)[0]) == {"accuracy", "length", "truncated", "kl"}
    assert {body["path"] for body in service.asked} == {"/v1/completions", "/v1/rewards"}


def test_nothing_is_rated_that_no_margin_asks_for(service: Standin, write_rows: Any) -> None:
    config = gate(write_rows, margins={"accuracy": None})
    assert set(figures(config, service)[0]) == {"reward", "eval_rewards/keywords", "length", "truncated"}
    prompts = [{"prompt": row["prompt"], "keywords": row["keywords"]} for row in ROWS]
    figures(gate(write_rows, prompts, margins={}), service)
    assert all(body["path"] == "/v1/chat/completions" for body in service.asked)


def test_an_empty_answer_has_no_divergence_and_is_not_rated(service: Standin, write_rows: Any) -> None:
    service.says[2] = lambda prompt: ""
    found = figures(gate(write_rows), service)
    assert "kl" not in found[1]
    assert "kl" in names(compare(*found, Margins(max_kl=60)))


def test_only_so_many_prompts_are_used_and_so_many_at_once(service: Standin, write_rows: Any) -> None:
    rows = [{**ROWS[0], "prompt": f"{number} + 2?"} for number in range(20)]
    figures(gate(write_rows, rows, num_prompts=9, concurrency=3), service)
    assert len([body for body in service.asked if body["path"] == "/v1/chat/completions"]) == 18
    assert 1 <= service.most_at_once <= 3


def test_a_busy_endpoint_is_asked_again(service: Standin, write_rows: Any) -> None:
    service.busy = 5
    figures(gate(write_rows), service)
    assert service.busy == 0
    assert len(service.asked) == 8


def test_an_endpoint_that_stays_busy_is_told_so(service: Standin) -> None:
    service.busy = 1000
    with (
        EndpointClient(service.url, timeout_s=10) as asked,
        pytest.raises(ServingError, match=r"refuses POST /x: Too busy\. \(HTTP status 429\)"),
    ):
        asked.post("/x", {}, dict, retry_when_busy=True)
    assert service.busy == 992


def test_a_version_that_is_not_loaded_is_an_error_in_the_endpoint_s_words(service: Standin, write_rows: Any) -> None:
    service.registry.end_canary()
    with pytest.raises(ServingError, match=r"Version 2 is not loaded; \[1\] are\. \(HTTP status 409\)"):
        figures(gate(write_rows), service)


def test_an_answer_of_another_version_is_not_taken_for_the_one_asked_for(service: Standin, write_rows: Any) -> None:
    service.answer = lambda body, wanted, prompt: ("4", 1)  # type: ignore[method-assign]
    with pytest.raises(ServingError, match="asked for an answer of version 2, and gave one of 1"):
        figures(gate(write_rows), service)


def test_an_endpoint_with_a_reward_model_can_compare_pairs_but_knows_no_divergence(
    service: Standin, write_rows: Any
) -> None:
    service.rates_by_model = True
    with pytest.raises(ServingError, match=r"set margins\.max_kl to null"):
        figures(gate(write_rows), service)
    assert figures(gate(write_rows, margins={}), service)[0]["accuracy"] == 0.75


def test_the_first_failure_ends_the_examination(service: Standin, write_rows: Any) -> None:
    rows = [{**ROWS[0], "prompt": f"{number} + 2?"} for number in range(200)]
    service.says[2] = broken
    with pytest.raises(ServingError, match="HTTP status 500"):
        figures(gate(write_rows, rows, num_prompts=200, concurrency=2), service)
    assert len(service.asked) < 50


def test_a_scorer_that_needs_what_texts_do_not_tell_says_so(service: Standin, write_rows: Any) -> None:
    config = gate(write_rows, eval_rewards=[{"name": "length", "unit": "tokens", "target": 5}])
    with pytest.raises(RewardError, match="these have text alone"):
        figures(config, service)


def test_a_margin_for_a_scorer_that_there_is_not_is_refused(service: Standin, write_rows: Any) -> None:
    with pytest.raises(ConfigError, match="there is no scorer 'keyword'; there are keywords"):
        figures(gate(write_rows, margins={"eval_rewards": {"keyword": 0.1}}), service)
    assert service.asked == []


@pytest.mark.parametrize(
    ("row", "why"),
    [("{", r"rows\.jsonl:3: is not valid JSON"), ({"prompt": "x"}, r"rows\.jsonl:3: column 'keywords' .* is missing")],
)
def test_a_row_that_cannot_be_used_is_named(write_rows: Any, row: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        held_out(gate(write_rows, [*ROWS, row]))


def test_no_rows_are_no_examination(write_rows: Any) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        held_out(gate(write_rows, []))


def test_an_equal_candidate_passes() -> None:
    assert compare(
        SAME, SAME, Margins(max_kl=10, max_length_ratio=1, reward=0, accuracy=0, eval_rewards={"keywords": 0})
    ).passes


@pytest.mark.parametrize(
    ("figure", "passes", "fails"),
    [
        ("accuracy", 0.88, 0.879),
        ("reward", 0.45, 0.449),
        ("eval_rewards/keywords", 0.4, 0.399),
        ("length", 60.0, 60.1),
        ("kl", 30.0, 30.1),
        ("accuracy", 1.0, math.nan),
        ("reward", 9.0, math.nan),
        ("length", 1.0, math.nan),
    ],
)
def test_every_margin_has_an_edge(figure: str, passes: float, fails: float) -> None:
    margins = Margins(accuracy=0.02, reward=0.05, eval_rewards={"keywords": 0.1}, max_length_ratio=1.5, max_kl=30)
    assert compare(SAME, {**SAME, figure: passes}, margins).passes
    assert names(compare(SAME, {**SAME, figure: fails}, margins)) == [figure]


def test_what_is_not_asked_for_is_shown_and_does_not_count() -> None:
    nothing = Margins(accuracy=None, reward=None, max_length_ratio=None)
    result = compare(SAME, dict.fromkeys(SAME, 1e9), nothing)
    assert result.passes
    assert [line.name for line in result.lines] == list(SAME)


def test_a_verdict_is_a_table() -> None:
    result = compare(SAME, {**SAME, "accuracy": 0.5, "length": 27.0}, Margins(max_kl=30))
    assert result.table("version 2", "version 3").splitlines() == [
        "                       version 2  version 3  allowed",
        "accuracy               0.9        0.5        ≥ 0.88   WORSE",
        "reward                 0.5        0.5        ≥ 0.45   ok",
        "eval_rewards/keywords  0.5        0.5",
        "length                 40         27         ≤ 60     ok",
        "truncated              0.1        0.1",
        "kl                     10         10         ≤ 30     ok",
    ]


def test_the_example_examines_on_the_bundled_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_gate(ROOT / "configs" / "serve" / "gate.yaml")
    groups = held_out(config)
    assert len(groups) == 64
    assert all(group.pairs and group.columns["keywords"] for group in groups)
    assert [scorer.name for scorer in config.eval_rewards] == ["keywords"]


def test_a_file_with_the_names_of_earlier_releases_loads(tmp_path: Path) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text("data: {path: x.jsonl}\nprompts: 3\njudges: [{name: keywords}]\nmargins: {judges: {keywords: 0.1}}")
    config = load_gate(file)
    assert (config.num_prompts, [scorer.name for scorer in config.eval_rewards]) == (3, ["keywords"])
    assert config.margins.eval_rewards == {"keywords": 0.1}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("data: {path: x.jsonl}\nmargins: {max_length: 2}", "did you mean 'max_length_ratio'"),
        (
            "data: {path: x.jsonl}\neval_rewards: [{name: keyword}]",
            "there is no scorer 'keyword'; did you mean 'keywords'",
        ),
        ("data: {path: x.jsonl}\nmargins: {accuracy: -1}", r"margins\.accuracy"),
        ("data: {keep: [a]}", r"data\.path: is required"),
        ("num_prompts: 3", "data: is required and missing"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, settings: str, why: str) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text(settings)
    with pytest.raises(ConfigError, match=why):
        load_gate(file)
