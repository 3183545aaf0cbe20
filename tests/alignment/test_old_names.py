"""Configurations and checkpoints that were written with the names of an earlier release load with the new names."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from alignment.algorithms.dpo import DPO
from alignment.algorithms.grpo import GRPO
from alignment.errors import ConfigError
from alignment.run_folder import RunFolder
from alignment.run_log import RunLog
from alignment.settings import old_names
from alignment.settings.load import load_config
from alignment.settings.old_names import rename_old_keys
from alignment.settings.run import RunConfig

OLD = {"kl_in": "none", "loss_per": "completion", "ratio_per": "token", "correction": "sequence"}
NEW = {
    "kl_placement": "none",
    "loss_aggregation": "completion",
    "importance_level": "token",
    "importance_correction": "sequence",
}


@pytest.fixture(autouse=True)
def first_note() -> Iterator[None]:
    """A note is logged once in a process; here every test is the first."""
    old_names._log_old_name.cache_clear()
    yield
    old_names._log_old_name.cache_clear()


def load(folder: Path, *overrides: str, model: Any = None, **algorithm: str) -> RunConfig:
    path = folder / "run.yaml"
    settings: dict[str, Any] = {"name": "run", "steps": 1, "data": {"path": "a.jsonl"}}
    settings["algorithm"] = {"name": "grpo", **algorithm}
    if settings["algorithm"]["name"] == "grpo":
        settings["rewards"] = [{"name": "length", "target": 9}]
    path.write_text(yaml.safe_dump({**settings, "model": model or {}}))
    return load_config(path, overrides, kind=RunConfig)


def test_old_keys_mean_the_new_ones_and_a_note_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        old, new = load(tmp_path, **OLD), load(tmp_path, **NEW)
        load(tmp_path, **OLD)
    assert old == new
    assert isinstance(old.algorithm, GRPO) and old.algorithm.importance_correction == "sequence"
    notes = [record.message for record in caplog.records]
    assert len(notes) == len(OLD)
    assert "the setting kl_in is called kl_placement now; its old name works in this release only" in notes


def test_an_old_value_means_the_new_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, model={"attention": "blocks"}).model.attention == "grouped"
    assert "attention: blocks is called attention: grouped" in caplog.text


@pytest.mark.parametrize(("key", "override"), [("kl_in", "kl_placement"), ("kl_placement", "kl_in")])
def test_an_override_replaces_the_value_by_whichever_name(tmp_path: Path, key: str, override: str) -> None:
    config = load(tmp_path, f"algorithm.{override}=reward", **{key: "none"})
    assert isinstance(config.algorithm, GRPO) and config.algorithm.kl_placement == "reward"


def test_both_names_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="algorithm: kl_in is the old name of kl_placement, and both are given"):
        load(tmp_path, kl_in="none", kl_placement="loss")


@pytest.mark.parametrize(("key", "override"), [("loss", "loss_type"), ("loss_type", "loss")])
def test_a_synonym_is_a_name_like_the_other(tmp_path: Path, key: str, override: str) -> None:
    config = load(tmp_path, f"algorithm.{override}=ipo", name="dpo", **{key: "hinge"})
    assert isinstance(config.algorithm, DPO) and config.algorithm.loss_type == "ipo"
    with pytest.raises(ConfigError, match="loss is another name of loss_type, and both are given"):
        load(tmp_path, name="dpo", loss="ipo", loss_type="hinge")


def test_stored_settings_are_renamed_only_where_the_run_has_the_new_name() -> None:
    current = {"algorithm": {**NEW, "beta": 1.0}, "rewards": [{"name": "length"}], "own": {"correction": 1}}
    stored = {"algorithm": OLD, "rewards": [{"name": "length"}], "own": {"correction": 2}}
    assert rename_old_keys(stored, current) == {**stored, "algorithm": NEW}


def test_an_algorithm_of_another_package_may_use_the_old_names_of_attributes() -> None:
    class Mine(DPO):
        samples: ClassVar[bool] = True
        tempered = True

        @property
        def first_kl_coefficient(self) -> float:
            return 3.0

    assert Mine.is_online and Mine.uses_sampling_temperature and Mine(name="dpo").init_kl_coef == 3.0
    assert not DPO.is_online and not DPO.uses_sampling_temperature


def test_a_run_log_of_an_earlier_release_goes_on_under_its_new_name(tmp_path: Path) -> None:
    rows = [f'{{"step": {step}, "position": {4 * step}, "versions": [], "prompts": []}}\n' for step in (1, 2, 3)]
    (tmp_path / "ledger.jsonl").write_text("".join(rows))
    log = RunLog(RunFolder(tmp_path))
    log.truncate_after(2)
    log.write_step(3, 12, {"versions": [], "prompts": []})
    assert (tmp_path / "provenance.jsonl").read_text() == "".join(rows)
    assert not (tmp_path / "ledger.jsonl").exists()
