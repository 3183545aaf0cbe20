"""The demo's preference set and its figures, and the page that a run is reported on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from alignment.distributed.world import World
from alignment.errors import ConfigError
from alignment.metrics import FileReporter
from alignment.report import write_report
from alignment.run_folder import RunFolder
from alignment.settings.run import RunConfig
from alignment.train import train
from cluster.demo import QUESTIONS, DemoAnswer, Exchange, comparison, contains_keyword, read_questions, table

ROOT = Path(__file__).parents[2]
HELD_OUT = read_questions(ROOT / QUESTIONS)
TRAINING = read_questions(ROOT / "configs/data/short_answers.train.jsonl")
CORRECTED = read_questions(ROOT / "configs/data/short_answers.corrected.jsonl")


def test_the_preference_set_is_large_enough_and_holds_out_whole_questions() -> None:
    assert len(TRAINING) >= 200 and len(HELD_OUT) >= 40
    prompts = [row["prompt"] for row in TRAINING + HELD_OUT]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("row", TRAINING + HELD_OUT, ids=lambda row: row["id"])
def test_a_chosen_answer_is_right_and_much_shorter_than_the_rejected_one(row: dict[str, Any]) -> None:
    assert contains_keyword(row["chosen"], row["keywords"])
    assert not contains_keyword(row["prompt"], row["keywords"]), "the question must not give its answer away"
    assert len(row["chosen"].split()) <= 20
    assert len(row["rejected"]) > 1.5 * len(row["chosen"])


def test_corrected_pairs_reject_wrong_answers_to_the_same_questions() -> None:
    for row, corrected in zip(TRAINING, CORRECTED, strict=True):
        assert {**corrected, "rejected": row["rejected"]} == row
        assert contains_keyword(row["rejected"], row["keywords"])
        assert not contains_keyword(corrected["rejected"], row["keywords"])


def test_no_held_out_answer_is_a_training_answer() -> None:
    known = {keyword.lower() for row in TRAINING for keyword in row["keywords"]}
    assert not known & {keyword.lower() for row in HELD_OUT for keyword in row["keywords"]}


def test_a_keyword_counts_only_as_a_whole_word() -> None:
    assert contains_keyword("It is PARIS.", ["Paris"])
    assert contains_keyword("H2O, water", ["H2O"])
    assert not contains_keyword("Comparisons", ["Paris"])
    assert not contains_keyword("18 legs", ["8", "eight"])


def exchange(prompt: str, before: tuple[int, bool], after: tuple[int, bool]) -> Exchange:
    one, other = (
        DemoAnswer(text="<b>" + "word " * tokens, tokens=tokens, is_right=right) for tokens, right in (before, after)
    )
    return Exchange(prompt=prompt, answer_before=one, answer_after=other)


EXCHANGES = [exchange("a?", (80, True), (10, True)), exchange("b?", (60, False), (8, True))]


def test_the_comparison_counts_lengths_and_right_answers() -> None:
    assert comparison(EXCHANGES) == {
        "median_answer_tokens_before": 70.0,
        "keyword_rate_before": 0.5,
        "median_answer_tokens_after": 9.0,
        "keyword_rate_after": 1.0,
    }
    assert "a?" in table(EXCHANGES)


def test_a_report_needs_no_network_and_escapes_what_the_model_says(run_settings: dict[str, Any]) -> None:
    config = RunConfig.model_validate({**run_settings, "evaluate": {"samples": 2, "sample_tokens": 4}})
    train(config, World(), FileReporter(config))
    page = write_report(config.run_folder, [vars(one) for one in EXCHANGES], {"accuracy_after": 1.0}).read_text()
    assert not re.search(r"(src|href)=", page), "everything is in the one file"
    assert "<b>word" not in page and "&lt;b&gt;word" in page
    assert page.count("<polyline") >= 6 and "Samples during training" in page


def test_a_folder_that_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        write_report(RunFolder(tmp_path), [], {})
