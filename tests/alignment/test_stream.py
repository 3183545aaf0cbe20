"""Rows to groups in the order of training: what is left out, what is held out, and the cursor."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.data.reader import GroupReader
from alignment.data.stream import MIN_ROWS_FOR_BUDGET, ListStream, LiveStream, hold_out
from alignment.errors import DataError
from alignment.groups import Completion, Group
from alignment.settings.plugins import scorer_class
from tests.alignment.conftest import WriteRows, lines_of, load
from tests.conftest import pair_rows

BROKEN = '{"prompt": "the quick", "chosen": '


def listed(count: int, **settings: Any) -> ListStream:
    groups = [Group(id=f"rows:{number}", prompt="") for number in range(count)]
    return ListStream(groups, **{"seed": 0, "shuffle": True, **settings})


def test_every_epoch_visits_every_group_once_in_an_order_of_its_own() -> None:
    stream = listed(20)
    epochs = [lines_of(stream.take(20)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(20)) not in epochs


def test_the_order_depends_on_the_seed_alone() -> None:
    assert lines_of(listed(20).take(50)) == lines_of(listed(20).take(50))
    assert lines_of(listed(20).take(20)) != lines_of(listed(20, seed=1).take(20))
    assert lines_of(listed(4, seed=2**32 - 1).take(4))


def test_without_shuffling_the_files_order_is_kept_over_epochs() -> None:
    assert lines_of(listed(4, shuffle=False).take(10)) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("sizes", [[1] * 24, [5, 9, 10], [24], [13, 11]])
def test_how_many_are_taken_at_once_does_not_change_the_order(sizes: list[int]) -> None:
    stream = listed(10)
    assert [n for size in sizes for n in lines_of(stream.take(size))] == lines_of(listed(10).take(24))
    assert stream.position == 24


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("position", [0, 3, 8, 17])
def test_a_cursor_put_back_gives_the_same_groups_again(
    reader: Callable[..., GroupReader], write_rows: WriteRows, streaming: bool, position: int
) -> None:
    path = write_rows(pair_rows(8))

    def fresh() -> ListStream | LiveStream:
        stream = load(reader(path=str(path), streaming=streaming, shuffle_buffer=3)).train
        assert isinstance(stream, LiveStream if streaming else ListStream)
        return stream

    stream = fresh()
    everything = lines_of(stream.take(25))
    stream.position = position
    assert lines_of(stream.take(5)) == everything[position : position + 5], "after going back"
    stream.position = 20
    assert lines_of(stream.take(5)) == everything[20:], "after going forward"
    resumed = fresh()
    resumed.position = position
    assert lines_of(resumed.take(5)) == everything[position : position + 5], "in another process"
    assert resumed.position == position + 5


def test_a_stream_shuffles_through_its_buffer_and_still_visits_every_group_once(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    path = str(write_rows(pair_rows(12)))
    stream = load(reader(path=path, streaming=True, shuffle_buffer=5)).train
    epochs = [lines_of(stream.take(12)) for _ in range(2)]
    assert all(sorted(epoch) == list(range(1, 13)) for epoch in epochs)
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    plain = load(reader(path=path, streaming=True, shuffle=False)).train
    assert lines_of(plain.take(15)) == [*range(1, 13), 1, 2, 3]


def test_a_stream_is_not_read_ahead_of_its_buffer(reader: Callable[..., GroupReader], write_rows: WriteRows) -> None:
    one = reader(path=str(write_rows(pair_rows(50))), streaming=True, shuffle_buffer=4)
    load(one).train.take(2)
    assert one.num_rows == 5


def test_held_out_prompts_are_never_trained_on() -> None:
    def group(number: int) -> Group:
        return Group(id=f"rows:{number}", prompt=f"prompt {number % 4}", completions=(Completion(text=str(number)),))

    groups = [group(number) for number in range(12)]
    rest, held = hold_out(groups, 4, seed=0)
    assert len(held) == 6, "whole prompts, until at least as many groups as asked for are held out"
    assert not {g.prompt for g in rest} & {g.prompt for g in held}
    assert sorted(lines_of(rest + held)) == list(range(12))
    assert lines_of(rest) == sorted(lines_of(rest)) and lines_of(held) == sorted(lines_of(held))
    assert hold_out(groups, 4, seed=0) == (rest, held)
    assert any(hold_out(groups, 4, seed=seed) != (rest, held) for seed in range(1, 5))


@pytest.mark.parametrize("count", [10, 12, 100])
def test_holding_out_everything_is_refused_with_figures(count: int) -> None:
    groups = [Group(id=f"rows:{number}", prompt=f"prompt {number % 4}") for number in range(12)]
    with pytest.raises(DataError, match=rf"data\.eval_groups \({count}\) leaves nothing to train on: there are 12"):
        hold_out(groups, count, seed=0)


def test_eval_groups_are_cut_from_the_training_data(reader: Callable[..., GroupReader], write_rows: WriteRows) -> None:
    data = load(reader(path=str(write_rows(pair_rows(20))), eval_groups=3))
    assert data.num_train is not None and 14 <= data.num_train <= 17
    assert len(data.eval) == 20 - data.num_train
    assert data.report == f"{data.num_train} groups to train on, {len(data.eval)} held out, from 20 rows"


@pytest.mark.parametrize(("eval_groups", "expected"), [(0, 6), (4, 4), (9, 6)])
def test_an_eval_source_is_read_beside_the_training_data(
    reader: Callable[..., GroupReader], write_rows: WriteRows, eval_groups: int, expected: int
) -> None:
    held_out = {"path": str(write_rows(pair_rows(6), "held_out.jsonl"))}
    data = load(reader(path=str(write_rows(pair_rows(8))), eval=held_out, eval_groups=eval_groups))
    assert data.num_train == 8
    assert lines_of(data.eval) == list(range(1, expected + 1))


def test_eval_groups_cannot_be_cut_from_a_stream(reader: Callable[..., GroupReader], write_rows: WriteRows) -> None:
    with pytest.raises(DataError, match=r"data\.eval_groups cannot be cut from a stream; give data\.eval"):
        load(reader(path=str(write_rows(pair_rows(6))), streaming=True, eval_groups=2))


def test_the_first_bad_row_stops_the_reading_and_says_how_to_go_on(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    path = write_rows([*pair_rows(3), BROKEN, *pair_rows(3)])
    with pytest.raises(DataError) as caught:
        load(reader(path=str(path)))
    assert str(caught.value).startswith(f"{path}:4: is not valid JSON")
    assert "Set data.on_bad_row=skip to leave such rows out (up to data.bad_row_budget)" in str(caught.value)


def test_skipped_rows_are_counted_and_named(
    reader: Callable[..., GroupReader], write_rows: WriteRows, tmp_path: Path
) -> None:
    bad: list[Any] = [BROKEN, {"prompt": "the", "chosen": "é", "rejected": "é"}, {"prompt": "the quick"}, {"x": 1}]
    path = write_rows([*bad, *pair_rows(16)])
    one = reader(path=str(path), on_bad_row="skip", bad_row_budget=0.2)
    data = load(one)
    assert (one.num_rows, one.num_bad, data.num_train) == (20, 4, 16)
    named = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["row"] for row in named] == [f"{path}:{line}" for line in (1, 2, 3, 4)]
    assert named[0]["why"].startswith("is not valid JSON")
    assert named[1]["why"] == "chosen and rejected are the same"
    assert named[2]["why"] == "dpo needs two completions with different rewards; this row's rewards are []"
    assert named[3]["why"].startswith("has none of the known fields; its columns are 'x'. Say by data.columns")
    assert f"from 20 rows, 4 bad ones skipped (the first: {path}:1: is not valid JSON" in data.report


def test_too_many_bad_rows_stop_the_run_with_the_figures_and_the_first_three(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    path = write_rows([{"prompt": "the", "chosen": "fox", "rejected": "fox"}] * 5 + pair_rows(15))
    with pytest.raises(DataError) as caught:
        load(reader(path=str(path), on_bad_row="skip"))
    assert str(caught.value).splitlines() == [
        "5 of 20 rows are bad, more than data.bad_row_budget (0.05) allows. The first:",
        *(f"  {path}:{line}: chosen and rejected are the same" for line in (1, 2, 3)),
    ]
    assert load(reader(path=str(path), on_bad_row="skip", bad_row_budget=0.25)).num_train == 15


def test_an_unlimited_budget_with_no_good_row_still_stops(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    for streaming in (False, True):
        one = reader(path=str(write_rows([BROKEN] * 3)), on_bad_row="skip", bad_row_budget=1, streaming=streaming)
        with pytest.raises(DataError, match="no usable group"):
            load(one).train.take(1)


def test_rows_that_the_window_or_the_template_refuses_are_bad_rows_too(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    long = {"prompt": "the quick brown fox " * 40, "chosen": " yes", "rejected": " no"}
    one = reader(path=str(write_rows([*pair_rows(9), long])), on_bad_row="skip", bad_row_budget=0.1, max_length=96)
    assert load(one).num_train == 9
    assert "fills the window (data.max_length 96)" in one.first_bad[0]


@pytest.mark.parametrize("bad", [BROKEN, {"prompt": 5}, "[1]", {"prompt": "a", "completions": ["\ud800"]}])
def test_a_bad_row_in_the_middle_of_a_stream_does_not_stop_it(
    reader: Callable[..., GroupReader], write_rows: WriteRows, tmp_path: Path, bad: Any
) -> None:
    path = str(write_rows([*pair_rows(5), bad, *pair_rows(4)]))
    one = reader(path=path, on_bad_row="skip", streaming=True, shuffle=False)
    stream = load(one).train
    good = [1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert lines_of(stream.take(27)) == good * 3
    stream.position = 2
    assert lines_of(stream.take(4)) == [3, 4, 5, 7]
    named = (tmp_path / "bad_rows.jsonl").read_text().splitlines()
    assert len(named) == 1, "a row that a stream meets in every epoch is named once"


def test_a_bad_row_in_a_stream_stops_it_by_default(reader: Callable[..., GroupReader], write_rows: WriteRows) -> None:
    path = write_rows([*pair_rows(3), BROKEN])
    stream = load(reader(path=str(path), streaming=True, shuffle=False)).train
    assert lines_of(stream.take(3)) == [1, 2, 3]
    with pytest.raises(DataError, match=r"rows\.jsonl:4: is not valid JSON"):
        stream.take(1)


def test_a_stream_that_breaks_its_budget_stops_once_the_fraction_means_something(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    rows: list[Any] = [BROKEN, *pair_rows(4)] * 30
    stream = load(reader(path=str(write_rows(rows)), on_bad_row="skip", streaming=True, shuffle=False)).train
    assert len(stream.take(MIN_ROWS_FOR_BUDGET * 4 // 5 - 1)) == 79
    with pytest.raises(DataError, match=r"of \d+ rows are bad, more than data\.bad_row_budget \(0\.05\) allows"):
        stream.take(5)


def test_rows_with_too_many_characters_are_left_out_and_counted(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    rows: list[Any] = [
        {"prompt": "12345", "chosen": "678", "rejected": "9"},
        {"prompt": "12345", "chosen": "6", "rejected": "7890"},
        {"prompt": [{"role": "user", "content": "12345"}], "chosen": "6", "rejected": "7890"},
    ]
    one = reader(path=str(write_rows(rows)), max_characters=8, bad_row_budget=0)
    data = load(one)
    assert (data.num_train, one.num_long, one.num_bad) == (1, 2, 0)
    assert "from 3 rows, 2 longer than 8 characters left out" in data.report


def test_all_turns_of_a_conversation_count_as_characters(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    turns = [("user", "12"), ("assistant", "34"), ("user", "56"), ("assistant", "78")]
    path = str(write_rows([{"messages": [{"role": role, "content": text} for role, text in turns]}]))
    assert load(reader("sft", path=path, max_characters=8)).num_train == 1
    with pytest.raises(DataError, match="1 longer than 7 characters left out"):
        load(reader("sft", path=path, max_characters=7))


@pytest.mark.parametrize("key", ["fraction", "weight"])
@pytest.mark.parametrize(("share", "count"), [(1.0, 100), (0.29, 29), (0.5, 50), (0.0, 0)])
def test_a_fraction_uses_that_part_of_the_groups_also_by_its_old_name(
    reader: Callable[..., GroupReader], write_rows: WriteRows, key: str, share: float, count: int
) -> None:
    one = {"path": str(write_rows(pair_rows(100))), key: share}
    other = {"path": str(write_rows(pair_rows(5), "other.jsonl"))}
    data = load(reader(mixture=[one, other]))
    assert data.num_train == count + 5
    ids = [group.id for group in data.train.take(count + 5)]
    assert len(set(ids)) == count + 5
    assert sum("other.jsonl" in name for name in ids) == 5
    assert ("is read as a fraction" in data.report) == (key == "weight" and share < 1)


def test_a_fraction_takes_a_random_part_if_shuffled_and_the_front_if_not(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    path = str(write_rows(pair_rows(20)))
    front = load(reader(path=path, fraction=0.5, shuffle=False)).train.take(10)
    assert lines_of(front) == list(range(1, 11))
    drawn = lines_of(load(reader(path=path, fraction=0.5)).train.take(10))
    assert len(set(drawn)) == 10 and max(drawn) > 10
    assert drawn == lines_of(load(reader(path=path, fraction=0.5)).train.take(10))


def test_a_fraction_holds_for_a_stream_as_well(reader: Callable[..., GroupReader], write_rows: WriteRows) -> None:
    sources = [
        {"path": str(write_rows(pair_rows(200), "one.jsonl")), "fraction": 0.25, "streaming": True},
        {"path": str(write_rows(pair_rows(20), "two.jsonl")), "streaming": True},
    ]
    stream = load(reader(mixture=sources)).train
    ids = [group.id for group in stream.take(400)]
    seen = {name for name in ids if "one.jsonl" in name}
    assert 30 <= len(seen) <= 70
    assert len({name for name in ids if "two.jsonl" in name}) == 20
    assert stream.take(0) == []
    alone = load(reader(path=sources[0]["path"], weight=0.25, streaming=True)).train
    assert 30 <= len({group.id for group in alone.take(150)}) <= 70, "alone, by its old name"


def sizes_of(groups: list[Group]) -> dict[str, int]:
    """How many groups came from each file."""
    return dict(Counter(Path(group.id.rpartition(":")[0]).name for group in groups))


@pytest.fixture
def streams(write_rows: WriteRows) -> Callable[..., list[dict[str, Any]]]:
    """Three streaming sources of 60, 60 and 7 rows, with weights."""

    def make(*weights: float) -> list[dict[str, Any]]:
        files = zip(("a.jsonl", "b.jsonl", "c.jsonl"), (60, 60, 7), strict=True)
        paths = [str(write_rows(pair_rows(count), name)) for name, count in files]
        return [
            {"path": path, "streaming": True, "weight": weight} for path, weight in zip(paths, weights, strict=False)
        ]

    return make


def test_a_streaming_mixture_is_mixed_by_weight_from_its_first_groups_on(
    reader: Callable[..., GroupReader], streams: Callable[..., list[dict[str, Any]]]
) -> None:
    stream = load(reader(mixture=streams(3, 1, 1), shuffle_buffer=5)).train
    first, all_of_them = sizes_of(stream.take(40)), sizes_of(stream.take(960))
    assert set(first) == {"a.jsonl", "b.jsonl", "c.jsonl"}
    assert 520 <= all_of_them["a.jsonl"] <= 630 and 150 <= all_of_them["c.jsonl"] <= 240
    equal = sizes_of(load(reader(mixture=streams(1, 1, 1))).train.take(300))
    assert all(70 <= count <= 130 for count in equal.values())
    assert sizes_of(load(reader(mixture=streams(1, 0, 1))).train.take(50)).keys() == {"a.jsonl", "c.jsonl"}


def test_every_source_of_a_mixture_has_a_place_of_its_own(
    reader: Callable[..., GroupReader], streams: Callable[..., list[dict[str, Any]]]
) -> None:
    stream = load(reader(mixture=streams(1, 1, 1), shuffle=False)).train
    groups = stream.take(120)
    for name, count in (("a", 60), ("b", 60), ("c", 7)):
        lines = lines_of([group for group in groups if f"{name}.jsonl" in group.id])
        assert lines == [1 + number % count for number in range(len(lines))], "in the file's order, over and over"
    assert sizes_of(groups)["c.jsonl"] > 14, "a short one begins again while the others go on"


@pytest.mark.parametrize("position", [1, 37, 150])
def test_a_mixture_goes_on_exactly_where_it_was(
    reader: Callable[..., GroupReader], streams: Callable[..., list[dict[str, Any]]], position: int
) -> None:
    def fresh() -> Any:
        return load(reader(mixture=streams(3, 1, 0.5), shuffle_buffer=4)).train

    whole = [group.id for group in fresh().take(200)]
    resumed = fresh()
    resumed.position = position
    assert [group.id for group in resumed.take(40)] == whole[position : position + 40]
    resumed.position = 2
    assert [group.id for group in resumed.take(9)] == whole[2:11], "after a roll-back"


def test_a_stream_whose_order_would_be_another_has_another_fingerprint(
    reader: Callable[..., GroupReader], streams: Callable[..., list[dict[str, Any]]]
) -> None:
    settings: list[dict[str, Any]] = [
        {"mixture": streams(1, 1)},
        {"mixture": streams(2, 1)},
        {"mixture": streams(1, 1), "shuffle_buffer": 4},
        {"mixture": streams(1, 1, 1)},
        {"mixture": [{**source, "fraction": 0.5} for source in streams(1, 1)]},
        {"mixture": [{**source, "skip": 1} for source in streams(1, 1)]},
    ]
    fingerprints = [load(reader(**changed)).fingerprint for changed in settings]
    assert len(set(fingerprints)) == len(settings)
    assert load(reader(**settings[0])).fingerprint == fingerprints[0]


def test_held_out_rows_are_read_as_the_training_rows_are(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    rows = [{"q": {"text": "the quick"}, "good": " fox", "bad": " dog", "answer": 4}]
    train, held_out = str(write_rows(rows)), {"path": str(write_rows(rows, "held_out.jsonl"))}
    reading = {
        "prompt_template": "{q.text} brown",
        "prompt_as": "user_message",
        "columns": {"chosen": "good", "rejected": "bad"},
        "keep": ["answer"],
    }
    for data in ({"path": train, **reading}, {"mixture": [{"path": train, **reading}, {"path": train, **reading}]}):
        loaded = load(reader(**data, eval=held_out))
        (trained, *_), (measured,) = loaded.train.take(1), loaded.eval
        assert measured.prompt_tokens == trained.prompt_tokens
        assert measured.columns == trained.columns == {"answer": 4}
    other = load(reader(path=train, **reading, eval={**held_out, "prompt_as": "text", "keep": []})).eval[0]
    assert (other.prompt, other.columns) == ("the quick brown", {})


def test_held_out_rows_may_be_another_split_of_the_same_set(
    reader: Callable[..., GroupReader], write_rows: WriteRows, tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    write_rows(pair_rows(4), "set/train.jsonl")
    write_rows(pair_rows(3), "set/test.jsonl")
    data = load(reader(path=str(tmp_path / "set"), eval={"split": "test"}))
    assert (data.num_train, [Path(group.id).name for group in data.eval][:1]) == (4, ["test.jsonl:1"])


def test_prompts_that_are_measured_on_and_trained_on_are_told(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    other = str(write_rows([*pair_rows(2), {"prompt": "another", "chosen": "a", "rejected": "b"}], "other.jsonl"))
    data = load(reader(path=str(write_rows(pair_rows(8))), eval={"path": other}))
    assert "8 groups to train on, 3 held out (2 of them with prompts that are trained on), from 11 rows" in data.report
    apart = load(reader(path=str(write_rows(pair_rows(8))), eval={"path": other, "skip": 2}))
    assert "8 groups to train on, 1 held out, from 9 rows" in apart.report


def test_rows_are_the_same_groups_in_every_kind_of_file(
    reader: Callable[..., GroupReader], write_rows: WriteRows, tmp_path: Path
) -> None:
    import datasets

    turns = [{"role": "user", "content": "the, \n quick"}]
    rows = [
        {"prompt": turns, "completion": f" fox {number}", "label": number % 2 == 0, "answer": number}
        for number in range(4)
    ]
    table = [{**row, "prompt": json.dumps(row["prompt"])} for row in rows]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(table).to_csv(tmp_path / "rows.csv")
    datasets.Dataset.from_list(table).to_csv(tmp_path / "rows.tsv", sep="\t")
    (tmp_path / "rows.json").write_text(json.dumps({"data": rows}))
    paths = [str(write_rows(rows)), *(str(tmp_path / f"rows.{kind}") for kind in ("json", "parquet", "csv", "tsv"))]
    read = [load(reader("sft", path=path, keep=["answer"])) for path in (*paths, str(tmp_path / "saved"))]
    assert [data.num_train for data in read] == [2] * 6
    assert len({data.fingerprint for data in read}) == 1
    assert all({group.columns["answer"] for group in data.train.take(2)} == {0, 2} for data in read)


GRADED: list[Any] = [{"prompt": f"{n} + 1?", "answer": str(n + 1) if n != 3 else "no solution"} for n in range(8)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_a_scorer_cannot_read_is_bad_before_anything_is_sampled(
    reader: Callable[..., GroupReader], write_rows: WriteRows, streaming: bool
) -> None:
    path, scorer = str(write_rows(GRADED)), scorer_class("exact_number").model_validate({"name": "exact_number"})
    settings: Any = {"path": path, "keep": ["answer"], "shuffle": False, "streaming": streaming}
    with pytest.raises(DataError, match=r"rows\.jsonl:4: exact_number: .*'no solution'.*on_bad_row=skip"):
        load(reader("grpo", rewards=[scorer], **settings)).train.take(8)
    skipping = reader("grpo", rewards=[scorer], on_bad_row="skip", bad_row_budget=0.5, **settings)
    assert lines_of(load(skipping).train.take(7)) == [1, 2, 3, 5, 6, 7, 8]
    assert skipping.num_bad == 1


def test_eval_rewards_are_asked_about_held_out_rows_alone(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    scorer = scorer_class("exact_number").model_validate({"name": "exact_number"})
    path, good = str(write_rows(GRADED)), {"path": str(write_rows(GRADED[:2], "held_out.jsonl"))}
    settings: Any = {"path": path, "keep": ["answer"], "eval_rewards": [scorer]}
    assert load(reader("grpo", **settings, eval=good)).num_train == 8
    with pytest.raises(DataError, match=r"held_out\.jsonl:4: exact_number"):
        load(reader("grpo", **settings, eval={"path": str(write_rows(GRADED, "held_out.jsonl"))}))
    with pytest.raises(DataError, match=r"rows\.jsonl:4: exact_number"):
        load(reader("grpo", **settings, eval_groups=2))


def test_a_mixture_reads_every_source_with_its_own_columns(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    stack = {"question": "why?", "response_j": "so", "response_k": "no idea"}
    sources = [
        {"path": str(write_rows(pair_rows(3), "one.jsonl")), "skip": 1},
        {"path": str(write_rows([stack] * 2, "two.jsonl"))},
        {"path": str(write_rows([{"q": "why?", "good": "so", "bad": "no"}], "three.jsonl")),
         "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}, "prompt_as": "user_message"},
    ]  # fmt: skip
    groups = load(reader(mixture=sources, shuffle=False)).train.take(5)
    assert [Path(group.id).name for group in groups] == [
        "one.jsonl:2", "one.jsonl:3", "two.jsonl:1", "two.jsonl:2", "three.jsonl:1",
    ]  # fmt: skip
    assert groups[2].prompt == "Question: why?\n\nAnswer: "
    assert not isinstance(groups[4].prompt, str)


def test_the_fingerprint_changes_with_the_tokens_and_not_with_the_cursor(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    path = str(write_rows(pair_rows(6)))
    data = load(reader(path=path))
    before = data.fingerprint
    data.train.take(3)
    assert data.fingerprint == before == load(reader(path=path), seed=5).fingerprint
    assert load(reader(path=path, max_length=12, max_prompt_length=6)).fingerprint != before
    assert load(reader(path=path, skip=1)).fingerprint != before


def test_a_row_that_every_scorer_abstains_from_is_bad(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    number, length = (
        scorer_class(name).model_validate({"name": name, **settings})
        for name, settings in (("exact_number", {}), ("length", {"target": 5}))
    )
    sources = [
        {"path": str(write_rows(GRADED[:2])), "keep": ["answer"]},
        {"path": str(write_rows([{"prompt": "Hello?"}], "chat.jsonl"))},
    ]
    with pytest.raises(DataError, match=r"chat\.jsonl:1: no scorer has a reward for this row: .*\(answer\)"):
        load(reader("grpo", rewards=[number], mixture=sources))
    assert load(reader("grpo", rewards=[number, length], mixture=sources)).num_train == 3


def test_columns_that_nothing_reads_are_named(reader: Callable[..., GroupReader], write_rows: WriteRows) -> None:
    rows = [row | {"margin": 2, "answer": 4, "empty": None, "prompt_id": "1"} for row in pair_rows(3)]
    report = load(reader(path=str(write_rows(rows)), keep=["answer"])).report
    assert "; columns that are not read: margin, prompt_id" in report
    assert "columns" not in load(reader(path=str(write_rows(pair_rows(3))))).report


def test_a_row_without_an_answer_tells_which_columns_are_not_read(
    reader: Callable[..., GroupReader], write_rows: WriteRows
) -> None:
    with pytest.raises(DataError, match=r"these columns are not read: 'response'\. Say by data\.columns"):
        load(reader(path=str(write_rows([{"prompt": "the quick", "response": "brown"}]))))
