"""Who may have which version rate, and what a change of it costs the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from serving.config import ServeConfig
from serving.feedback.keys import Key, Role
from serving.http.routes.rewards import check_choice
from serving.registry.versions import Registry
from serving.replica.scoring import Policies, ScoreResult, Scoring, ScoringItem, ScoringRequest
from serving.schema import RequestError

MADE = 4


@pytest.fixture(scope="module")
def registry(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Version 3 answers, version 2 did before, version 1 is older; version 4 was registered only."""
    registry = Registry(tmp_path_factory.mktemp("registry"))
    for number in range(1, MADE + 1):
        folder = tmp_path_factory.mktemp("checkpoint") / str(number)
        shutil.copytree(tiny_model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"initializer_range": number / 10}))
        assert registry.add(folder).number == number
        if number < MADE:
            registry.promote(number)
    return registry


@pytest.mark.parametrize(
    ("role", "is_whole", "allowed", "status"),
    [
        ("user", False, [], 403),
        ("labeller", False, [2, 3], 409),
        ("admin", False, [1, 2, 3, 4], 409),
        ("user", True, [], 403),
        ("labeller", True, [3], 409),
        ("admin", True, [1, 2, 3, 4], 409),
    ],
)
def test_a_role_chooses_among_versions_that_it_may_have(
    registry: Registry, role: Role, is_whole: bool, allowed: list[int], status: int
) -> None:
    def refusal(version: int) -> int | None:
        try:
            check_choice(version, Key(name="x", role=role), registry, is_whole)
        except RequestError as refused:
            return refused.reply.status
        return None

    assert [version for version in range(1, MADE + 1) if refusal(version) is None] == allowed
    assert refusal(99) == status


def test_whole_weights_are_loaded_once_per_version_of_a_batch(
    registry: Registry, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig.model_validate(
        {"checkpoint": str(tiny_model), "dtype": "fp32", "rewards": {"reference": str(tiny_model), "max_length": 64}}
    )
    loaded: list[str] = []
    load = Policies._load
    monkeypatch.setattr(Policies, "_load", lambda self, path: (loaded.append(path), load(self, path))[1])
    scoring = Scoring(config, "cpu", str(registry.folder))
    loaded.clear()
    item = ScoringItem(prompt="x", completions=("y",))
    answers = scoring._score_all([ScoringRequest(items=(item,), version=1 + index % 2) for index in range(8)])
    assert [answer.version for answer in answers if isinstance(answer, ScoreResult)] == [1, 2] * 4
    assert len(loaded) == 2
