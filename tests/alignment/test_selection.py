"""What each algorithm takes of a row, and what it says of one that it cannot learn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alignment.data.reader import GroupReader
from alignment.errors import DataError
from tests.alignment.conftest import WriteRows, lines_of, load
from tests.conftest import pair_rows


def test_sft_learns_the_better_answer_of_a_pair(reader: Callable[..., GroupReader], write_rows: WriteRows) -> None:
    rows: list[Any] = [
        {"prompt": "the", "chosen": " fox", "rejected": " dog"},
        {"prompt": "the", "completions": [" dog", " fox", " hen"], "rewards": [0, 2, 1]},
        {"prompt": "the", "completion": " fox"},
        {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": " fox"}]},
    ]
    groups = load(reader("sft", path=str(write_rows(rows)), shuffle=False)).train.take(4)
    assert [[c.text for c in group.completions] for group in groups] == [[" fox"]] * 4


def test_sft_says_that_a_prompt_alone_cannot_be_imitated(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    with pytest.raises(DataError, match="sft needs a completion to imitate; this row has only a prompt"):
        load(reader("sft", path=str(write_rows([{"prompt": "the"}]))))


@pytest.mark.parametrize(
    ("row", "rewards"),
    [
        ({"prompt": "the"}, r"\[\]"),
        ({"prompt": "the", "completions": [" fox", " dog"]}, r"\[None, None\]"),
        ({"prompt": "the", "completion": " fox"}, r"\[None\]"),
    ],
)
def test_dpo_says_what_a_row_without_a_pair_lacks(
    reader: Callable[..., GroupReader], write_rows: WriteRows, row: dict[str, Any], rewards: str
) -> None:
    expected = rf"rows\.jsonl:1: dpo needs two completions with different rewards; this row's rewards are {rewards}"
    with pytest.raises(DataError, match=expected):
        load(reader(path=str(write_rows([row]))))


UNDECIDED = [
    {"prompt": "the", "completions": [" fox", " dog"], "rewards": [0.5, 0.5]},  # a tie
    {"prompt": "the", "completions": [" fox"], "rewards": [1]},  # a thumb
    {"prompt": "the", "completion": " fox", "label": True},
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("algorithm", ["dpo", "reward_model"])
def test_a_tie_or_a_thumb_is_no_bad_row_but_one_to_leave_out(
    reader: Callable[..., GroupReader], write_rows: WriteRows, algorithm: str, streaming: bool
) -> None:
    path = str(write_rows([*UNDECIDED, *pair_rows(2)]))
    one = reader(algorithm, path=path, streaming=streaming, shuffle=False, bad_row_budget=0)
    assert lines_of(load(one).train.take(2)) == [4, 5]
    assert (one.num_bad, one.num_undecided) == (0, 3)
    assert "3 that prefer no answer left out" in one.summary()


def test_rows_that_all_prefer_nothing_are_said_to(reader: Callable[..., GroupReader], write_rows: WriteRows) -> None:
    with pytest.raises(DataError, match=r"no usable group is left .*: 3 rows, 3 that prefer no answer left out"):
        load(reader(path=str(write_rows(UNDECIDED))))


SFT_ROWS: list[Any] = [
    {"prompt": "the", "completion": " fox"},
    {"prompt": "the", "completions": [" fox", " dog"]},
    {"prompt": "the", "completion": " fox", "label": True},
    {"prompt": "the", "completion": " no", "label": False},
    {"prompt": "the", "completions": [" no"], "rewards": [0.0]},
    {"prompt": "the", "completions": [" no", " no no"], "rewards": [0.0, 0.0]},
    {"prompt": "the", "completions": [" no", " no no"], "rewards": [0.5, 0.5]},
    {"prompt": "the", "completions": [" fox", " dog"], "rewards": [1.0, 1.0]},
    {"prompt": "the", "completions": [" no", " fox"], "rewards": [0.0, 1.0]},
    {"prompt": "the", "completions": [" fox", " no", " no no"], "rewards": [-1, -5, -9]},
    {"prompt": "the", "chosen": " fox", "rejected": " no"},
    {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": " no"}], "label": False},
    {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": " fox"}], "label": True},
    {"prompt": "the", "completion": " no", "weight": 0},
]


@pytest.mark.parametrize("streaming", [False, True])
def test_sft_imitates_demonstrations_and_what_is_rated_good_and_counts_what_it_leaves_out(
    reader: Callable[..., GroupReader], write_rows: WriteRows, streaming: bool
) -> None:
    path = str(write_rows(SFT_ROWS))
    one = reader("sft", path=path, shuffle=False, streaming=streaming, bad_row_budget=0)
    data = load(one)
    texts = [[completion.text for completion in group.completions] for group in data.train.take(8)]
    assert texts == [[" fox"], [" fox", " dog"], [" fox"], [" fox", " dog"], [" fox"], [" fox"], [" fox"], [" fox"]]
    if not streaming:
        assert data.num_train == 8
        assert "14 rows, 5 whose answers are not rated good left out, 1 of weight 0 left out" in data.report


def test_scores_that_are_no_numbers_are_counted(reader: Any, write_rows: Any) -> None:
    scores = [(float("nan"), 1), ("nan", "5"), ([1], [2]), (None, 1), (True, False), (2, 1), ("high", "low")]
    rows = [
        {"prompt": "p ", "chosen": "a", "rejected": "b", "score_chosen": chosen, "score_rejected": rejected}
        for chosen, rejected in scores
    ]
    data = load(reader(path=str(write_rows(rows))))
    assert "7 rows, 4 whose scores of chosen and rejected are no numbers" in data.report


def test_a_score_of_false_beside_one_of_true_contradicts_the_order(reader: Any, write_rows: Any) -> None:
    row = {"prompt": "p ", "chosen": "a", "rejected": "b", "score_chosen": False, "score_rejected": True}
    with pytest.raises(DataError, match="its scores contradict its order: chosen has 0 and rejected 1"):
        load(reader(path=str(write_rows([row]))))


def test_a_source_of_a_mixture_that_gives_nothing_is_named(reader: Any, write_rows: Any) -> None:
    full = write_rows([{"prompt": "p ", "chosen": "a", "rejected": "b"}], "full.jsonl")
    empty = write_rows([], "empty.jsonl")
    assert f"; no usable group in {empty}" in load(reader(mixture=[{"path": str(full)}, {"path": str(empty)}])).report
    assert "no usable group" not in load(reader(mixture=[{"path": str(full)}, {"path": str(full)}])).report


def test_equal_scores_of_a_pair_are_told_and_contradicting_ones_are_bad_rows(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    scores = [(8, 2), (5, 5), (None, 3), (2, 8)]
    rows = [
        {**row, "score_chosen": chosen, "score_rejected": rejected}
        for row, (chosen, rejected) in zip(pair_rows(4), scores, strict=True)
    ]
    data = load(reader(path=str(write_rows(rows)), on_bad_row="skip", bad_row_budget=0.5))
    assert data.num_train == 3
    assert "4 rows, 1 whose chosen and rejected have equal scores, 1 bad ones skipped" in data.report
    with pytest.raises(DataError, match=r"rows\.jsonl:4: its scores contradict its order: chosen has 2 and rejected 8"):
        load(reader(path=str(write_rows(rows))))
