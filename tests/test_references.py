"""The pages of `docs/reference` say what the code says, and every metric that a run reports has its meaning there."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.groups import Group
from alignment.rollout.rollouter import Observation
from alignment.run_folder import RunFolder
from docs.generate.__main__ import FOLDER, PAGES
from docs.generate.metric_meanings import SECTIONS, meaning_of
from docs.generate.text import COMMAND, type_text
from tests.alignment.test_train import run

Settings = dict[str, Any]

WORTH = "tests.test_references:worth"
"""A scorer, by its dotted name."""


class Guesses:
    """An environment that ends every conversation after the first answer."""

    def __init__(self, group: Group) -> None: ...

    async def step(self, answer: str) -> Observation:
        return Observation(reward=0.5, is_done=True)


def worth(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    page_lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    change = list(
        difflib.unified_diff(page_lines, PAGES[name]().splitlines(), "the page", "the code", n=0, lineterm="")
    )
    assert not change, f"docs/reference/{name} is out of date; `{COMMAND}` renews it:\n" + "\n".join(change[:40])


def test_every_page_is_made_by_the_script() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(PAGES)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer", "minimum": 1}, "integer ≥ 1"),
        ({"type": "number", "minimum": 0.0, "maximum": 1.0}, "number 0 to 1"),
        ({"type": "integer", "exclusiveMaximum": float(2**63)}, "integer < 9223372036854775808"),
        ({"enum": ["auto", "bf16", "fp32"]}, "`auto`, `bf16` or `fp32`"),
        ({"anyOf": [{"type": "string", "maxLength": 9}, {"type": "null"}]}, "string of at most 9 characters or null"),
        ({"type": "array", "items": {"type": "string"}, "minItems": 2}, "list (at least 2) of string"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "mapping of number"),
        ({}, "anything"),
        ({"$ref": "#/$defs/Lora"}, "section"),
    ],
)
def test_types_are_told_in_words(schema: Settings, text: str) -> None:
    assert type_text(schema, {"$defs": {"Lora": {"type": "object"}}}) == text


@pytest.fixture
def runs(run_settings: Settings, write_rows: Callable[..., Path]) -> dict[str, Settings]:
    """Short runs that report, between them, everything that a run can report."""
    prompts = [{"prompt": f"the fox {number}"} for number in range(8)]
    sampling = {
        "data": {"path": str(write_rows(prompts, "prompts.jsonl")), "eval_groups": 2, "max_length": 32},
        "rollout": {"engine": "local", "completions": 2, "max_tokens": 4},
        "rewards": [{"name": WORTH}],
        "eval_rewards": [{"name": "length", "target": 3}],
    }
    conversation = {**sampling["rollout"], "environment": {"name": "tests.test_references:Guesses"}}
    every_run = {**run_settings, "steps": 1}
    texts = [" a", " a b c", " a", " a b c", " a b c"]
    pairs = [{"prompt": f"row {i}", "chosen": text, "rejected": " a b"} for i, text in enumerate(texts)]
    pairs_of_any_length = {"path": str(write_rows(pairs, "lengths.jsonl")), "eval_groups": 1, "max_length": 32}
    return {
        "sft": every_run | {"algorithm": {"name": "sft"}},
        "dpo": every_run | {"algorithm": {"name": "dpo", "loss": {"sigmoid": 1.0, "sft": 0.2}}},
        "reward_model": every_run | {"data": pairs_of_any_length} | {"algorithm": {"name": "reward_model"}},
        "ppo": every_run | sampling | {"algorithm": {"name": "ppo", "correction": "sequence"}},
        "grpo": every_run | sampling | {"algorithm": {"name": "grpo"}, "rollout": conversation},
        "online_dpo": every_run | sampling | {"algorithm": {"name": "online_dpo"}},
    }


def test_every_metric_has_a_meaning_and_every_meaning_a_metric(runs: dict[str, Settings]) -> None:
    metric_names: set[str] = set()
    for name, settings in runs.items():
        folder = run(settings, name=name)
        metric_names |= {metric for line in RunFolder(folder).read_metrics() for metric in line if metric != "step"}
    assert not {name for name in metric_names if meaning_of(name) is None}
    patterns = {pattern for meanings in SECTIONS.values() for pattern in meanings}
    patterns_of_metrics = {
        name.replace("worth", "NAME").replace("length", "NAME").replace("sigmoid", "NAME") for name in metric_names
    } | metric_names
    assert patterns - patterns_of_metrics == {"eval/METRIC"}
