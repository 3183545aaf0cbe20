"""Rewards are asked for until they are sound, summed by weight, and never silently missing."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

import jsonschema
import numpy as np
import pytest
import torch

from alignment.data.shapes import to_group
from alignment.distributed.world import World
from alignment.errors import ConfigError, DataError, RewardError
from alignment.groups import Completion, Group, Message
from alignment.rewards import AskAgain, BuildableScorer, Rewards, Scorer, Unreadable
from alignment.rewards.rules import Rule
from alignment.rollout.queue import scores_of
from alignment.settings.data import SourceConfig
from alignment.settings.load import check_config
from alignment.settings.plugins import scorer_class, scorer_names
from alignment.settings.run import RunConfig
from alignment.settings.schema import json_schema
from tests.workers import run_two

CPU = torch.device("cpu")
CALLS: list[dict[str, Any]] = []
SCRIPT: list[Any] = []
"""What `scripted` does, call by call: returns a list, raises an exception, or calls a function."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    CALLS.clear()
    SCRIPT.clear()
    yield


def scripted(prompts: list[Any], completions: list[str], **rest: Any) -> Any:
    CALLS.append({"prompts": prompts, "completions": completions, **rest})
    step = SCRIPT.pop(0) if SCRIPT else [float(len(text)) for text in completions]
    if isinstance(step, Exception):
        raise step
    return step(completions) if callable(step) else step


def shout(*, completions: list[str], prompts: list[str]) -> list[bool]:
    return [text.isupper() for text in completions]


def distance(completions: list[str], prompts: list[str], answer: list[str], *, factor: float) -> torch.Tensor:
    return torch.tensor([-factor * abs(float(a) - float(c)) for a, c in zip(answer, completions, strict=True)])


async def slowly(completions: list[str], prompts: list[str], seconds: float) -> list[float]:
    await asyncio.sleep(seconds)
    return [float(len(text)) for text in completions]


def sleeps(completions: list[str], prompts: list[str], seconds: float) -> list[float]:
    time.sleep(seconds)
    return [0.0] * len(completions)


def loses_its_loop(completions: list[str], prompts: list[str]) -> Any:
    CALLS.append({"thread": threading.current_thread().name})
    return _loop_of()


async def _loop_of() -> list[int]:
    return [id(asyncio.get_running_loop()) % 1000]


class Constant(BuildableScorer):
    """A scorer of one's own, by class."""

    value: float = 1.0

    def build(self, device: torch.device) -> Scorer:
        return ConstantScorer(self.value)


class Returning(BuildableScorer):
    """A scorer of one's own that returns something else than lists."""

    value: Any

    def build(self, device: torch.device) -> Any:
        return ReturningScorer(self.value)


class ReturningScorer:
    """Returns what it is told to."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def score(self, groups: list[Group]) -> Any:
        return self.value

    def close(self) -> None:
        """Holds nothing."""


class ConstantScorer:
    """Gives everything the same reward."""

    closed = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def score(self, groups: list[Group]) -> list[list[float]]:
        if self.value == 13:
            raise AskAgain("bad luck")
        return [[self.value] * len(group.completions) for group in groups]

    def close(self) -> None:
        ConstantScorer.closed += 1


def here(function: Callable[..., Any] | type) -> str:
    return f"{__name__}:{function.__name__}"


def group(*texts: str, name: str = "rows.jsonl:7", prompt: Any = "p", **columns: Any) -> Group:
    return Group(id=name, prompt=prompt, completions=tuple(Completion(text=text) for text in texts), columns=columns)


def rewards_of(*settings: dict[str, Any]) -> Rewards:
    return Rewards(tuple(scorer_class(each["name"]).model_validate(each) for each in settings), CPU)


def given(groups: list[Group]) -> list[list[float | None]]:
    return [[completion.reward for completion in each.completions] for each in groups]


def test_a_function_gets_one_entry_per_completion_and_every_kept_column() -> None:
    turns = (Message(role="user", content="hi"),)
    groups = [group("a", "bb", answer=[1], topic="x"), group("ccc", name="r:8", prompt=turns, answer="z")]
    rated = rewards_of({"name": here(scripted), "kwargs": {"factor": 2}}).score(groups)
    assert CALLS == [
        {
            "prompts": ["p", "p", [{"role": "user", "content": "hi"}]],
            "completions": ["a", "bb", "ccc"],
            "answer": [[1], [1], "z"],
            "topic": ["x", "x", None],
            "factor": 2,
        }
    ]
    assert given(rated) == [[1.0, 2.0], [3.0]]
    assert [each.id for each in rated] == ["rows.jsonl:7", "r:8"]


def test_a_function_gets_only_the_columns_that_it_has_parameters_for() -> None:
    assert given(rewards_of({"name": here(shout)}).score([group("A", "b", answer="z")])) == [[1.0, 0.0]]


def test_numbers_of_any_kind_are_taken() -> None:
    rewards = rewards_of({"name": here(distance), "kwargs": {"factor": 0.5}})
    assert given(rewards.score([group("3", "5", answer="4")])) == [[-0.5, -0.5]]
    SCRIPT.append([True, 2, 2.5])
    assert given(rewards_of({"name": here(scripted)}).score([group("a", "b", "c")])) == [[1.0, 2.0, 2.5]]


def test_a_function_that_needs_a_column_says_which() -> None:
    problem = "scorer distance: missing a required argument: 'answer'; add it to data.keep, as [answer], or to kwargs: "
    with pytest.raises(RewardError, match=re.escape(problem)):
        rewards_of({"name": here(distance), "kwargs": {"factor": 1}}).score([group("3", other=1)])


def test_a_column_that_is_an_argument_already_is_refused() -> None:
    rewards = rewards_of({"name": here(scripted), "kwargs": {"factor": 2}})
    with pytest.raises(RewardError, match="column 'factor'"):
        rewards.score([group("a", factor=3)])
    with pytest.raises(RewardError, match="column 'prompts'"):
        rewards.score([group("a", prompts=3)])


def test_an_asynchronous_function_is_awaited_in_one_loop() -> None:
    rewards = rewards_of({"name": here(slowly), "kwargs": {"seconds": 0.01}})
    assert given(rewards.score([group("a", "bb")])) == [[1.0, 2.0]]
    rewards.close()
    rewards = rewards_of({"name": here(loses_its_loop)})
    first, second = (given(rewards.score([group("a")])) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("function", [slowly, sleeps])
def test_a_late_function_is_asked_again_and_then_named(function: Callable[..., Any]) -> None:
    settings = {"name": here(function), "kwargs": {"seconds": 30}, "timeout_s": 0.1, "attempts": 2}
    rewards = rewards_of(settings)
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"it was not done after 0\.1 s, after 2 attempts"):
        rewards.score([group("a")])
    rewards.close()
    assert time.monotonic() - started < 25, "less than one call takes"


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ([math.nan, 1.0], "group rows.jsonl:7, completion 1 of 2: the reward is nan, not a number"),
        ([1.0, math.inf], "group rows.jsonl:7, completion 2 of 2: the reward is inf, not a number"),
        ([1.0, 1e39], "group rows.jsonl:7, completion 2 of 2: the reward is 1e+39, not a number"),
        ([1.0, "3"], "group rows.jsonl:7, completion 2 of 2: the reward is '3', not a number"),
        ([1.0], "group rows.jsonl:7: it returned 1 rewards for 2 completions"),
        (None, "group rows.jsonl:7: it returned a NoneType instead of a list of numbers"),
        (3.0, "group rows.jsonl:7: it returned a float instead of a list of numbers"),
        (ZeroDivisionError("no"), "group rows.jsonl:7: it raised ZeroDivisionError: no"),
        (AskAgain("tired"), "group rows.jsonl:7: tired"),
    ],
)
def test_what_is_wrong_is_asked_again_and_then_named(wrong: Any, problem: str) -> None:
    rewards = rewards_of({"name": here(scripted)})
    SCRIPT.extend([(lambda _: wrong) if wrong is None else wrong] * 2)
    assert given(rewards.score([group("a", "bb")])) == [[1.0, 2.0]], "the third attempt is sound"
    SCRIPT.extend([(lambda _: wrong) if wrong is None else wrong] * 3)
    with pytest.raises(RewardError) as caught:
        rewards.score([group("a", "bb")])
    assert str(caught.value) == f"scorer scripted: {problem}, after 3 attempts"
    assert len(CALLS) == 6


def maths(completions: list[str], task: list[str], **_: Any) -> list[float | None]:
    return [1.0 if kind == "maths" else None for kind in task]


def style(completions: list[str], task: list[str], **_: Any) -> list[float | None]:
    return [0.5 if kind == "style" else None for kind in task]


def test_the_reward_is_the_sum_over_the_scorers_that_do_not_abstain() -> None:
    groups = [group("a", "b", task="maths"), group("c", task="style")]
    rated = rewards_of({"name": here(maths), "weight": 2}, {"name": here(style)}).score(groups)
    assert given(rated) == [[2.0, 2.0], [0.5]]
    scores = [completion.scores for each in rated for completion in each.completions]
    assert scores == [{"maths": 1.0}, {"maths": 1.0}, {"style": 0.5}]


def test_when_every_scorer_abstains_it_is_an_error_after_one_call() -> None:
    SCRIPT.append([1.0, None])
    with pytest.raises(RewardError, match=r"group rows.jsonl:7, completion 2 of 2: every scorer abstains \(scripted\)"):
        rewards_of({"name": here(scripted)}).score([group("a", "bb")])
    assert len(CALLS) == 1
    rewards = rewards_of({"name": here(maths)})
    assert given(rewards.score([group("a", task="other")], may_abstain=True)) == [[None]]


def test_a_metric_is_the_mean_over_what_its_scorer_rated() -> None:
    groups = [group("a", "b", task="maths"), group("c", task="style")]
    rated = rewards_of({"name": here(maths)}, {"name": here(style)}).score(groups)
    completions = [completion for each in rated for completion in each.completions]
    assert scores_of("maths", completions) == [1.0, 1.0]
    assert scores_of("style", completions) == [0.5]


def picky(completions: list[str], **_: Any) -> list[float]:
    return [1 / (len(text) - 1) if text != "nan" else math.nan for text in completions]


def test_a_function_may_fail_on_a_text_where_a_reward_is_configured_for_it() -> None:
    groups = [group("aaa", "b", name="1"), group("nan", "cc", name="2")]
    assert given(rewards_of({"name": here(picky), "on_unreadable": -1}).score(groups)) == [[0.5, -1], [-1, 1]]
    with pytest.raises(RewardError, match="it raised ZeroDivisionError"):
        rewards_of({"name": here(picky)}).score(groups)


HUGE = [10**400, 10**5000, -(10**400), Fraction(10**400), Decimal("1e400"), np.longdouble("1e400"), 1e39, math.inf]
NO_NUMBERS = [
    "3",
    np.str_("3"),
    b"3",
    1 + 2j,
    np.complex64(1 + 2j),
    torch.tensor(1 + 2j),
    torch.ones(2),
    [1.0],
    {"a": 1},
]
NUMBERS = [True, np.bool_(True), np.int8(1), np.float16(1), torch.tensor(1), Decimal("1.0"), Fraction(1)]


@pytest.mark.parametrize("reward", HUGE, ids=lambda reward: f"{type(reward).__name__}")
def test_a_number_that_no_fp32_holds_is_missing_or_gets_what_is_configured(reward: Any) -> None:
    SCRIPT.extend([[reward, 1]] * 4)
    assert given(rewards_of({"name": here(scripted), "on_unreadable": -1}).score([group("a", "bb")])) == [[-1, 1]]
    with pytest.raises(RewardError, match=r"completion 1 of 2: the reward is .*, not a number, after 3 attempts"):
        rewards_of({"name": here(scripted)}).score([group("a", "bb")])


@pytest.mark.parametrize("on_unreadable", ["fail", -1])
@pytest.mark.parametrize("reward", NO_NUMBERS, ids=lambda reward: f"{type(reward).__name__}")
def test_what_is_no_number_is_no_reward(reward: Any, on_unreadable: Any) -> None:
    SCRIPT.extend([[reward, 1]] * 3)
    with pytest.raises(RewardError, match=r"completion 1 of 2: the reward is .*, not a number"):
        rewards_of({"name": here(scripted), "on_unreadable": on_unreadable}).score([group("a", "bb")])


@pytest.mark.parametrize("on_unreadable", ["fail", -1])
@pytest.mark.parametrize("reward", NUMBERS, ids=lambda reward: f"{type(reward).__name__}")
def test_numbers_of_any_library_are_rewards(reward: Any, on_unreadable: Any) -> None:
    SCRIPT.append([reward, 2])
    rewards = rewards_of({"name": here(scripted), "on_unreadable": on_unreadable})
    assert given(rewards.score([group("a", "bb")])) == [[1, 2]]


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ({1.0, 2.0}, "a set, which has no order, instead of a list of numbers"),
        (frozenset({1.0, 2.0}), "a frozenset, which has no order, instead of"),
        (dict.fromkeys((1.0, 2.0)).keys(), "a dict_keys, which has no order, instead of"),
        ({0: 1.0, 1: 2.0}, "a dict instead of"),
        ((float(number) for number in range(2)), "a generator instead of"),
        ("12", "a str instead of"),
        (b"12", "a bytes instead of"),
        (torch.tensor(1.0), "a Tensor instead of"),
        (np.array(1.0), "a ndarray instead of"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_has_no_order_is_no_list_of_rewards(returned: Any, problem: str) -> None:
    SCRIPT.extend([lambda _: returned] * 3)
    with pytest.raises(RewardError, match=f"it returned {problem}"):
        rewards_of({"name": here(scripted)}).score([group("a", "bb")])
    with pytest.raises(RewardError, match=problem.replace("numbers", "lists of numbers")):
        rewards_of({"name": here(Returning), "value": returned}).score([group("a"), group("bb")])
    with pytest.raises(RewardError, match=f"its rewards are {problem}"):
        rewards_of({"name": here(Returning), "value": [returned]}).score([group("a", "bb")])


@pytest.mark.parametrize("returned", [(1, 2), deque([1, 2]), array("d", [1, 2]), np.array([1, 2]), torch.ones(2)])
def test_what_has_an_order_is_a_list_of_rewards(returned: Any) -> None:
    SCRIPT.append(returned)
    assert given(rewards_of({"name": here(scripted)}).score([group("a", "bb")])) == [[1, float(returned[1])]]


def test_a_weighted_sum_that_no_fp32_holds_is_refused() -> None:
    for weight in (1e39, -1e39):
        (problem,) = problems({"name": "length", "target": 3, "weight": weight})
        assert problem.startswith(
            "rewards: length: weight: Input should be a number within fp32, which ends at 3.4e+38"
        )
    (problem,) = problems({"name": "length", "target": 3, "on_unreadable": 1e39})
    assert problem.startswith("rewards: length: on_unreadable: ") and "fp32" in problem, problem
    large = {"name": here(Constant), "value": 2e38, "weight": 1.0}
    assert given(rewards_of(large).score([group("a")])) == [[2e38]]
    for settings in ([{**large, "weight": 2.0}], [large, large], [{**large, "value": 10.0, "weight": 3e38}]):
        for may_abstain in (True, False):
            with pytest.raises(RewardError, match=r"the weighted sum of its rewards is .*, and fp32 ends"):
                rewards_of(*settings).score([group("a")], may_abstain=may_abstain)


def graded(prompts: list[str], completions: list[str], ground_truth: list[str]) -> list[float]:
    return [float(text == right) for text, right in zip(completions, ground_truth, strict=True)]


def test_a_nested_column_goes_to_the_parameter_of_its_last_name() -> None:
    nested = Group(id="1", prompt="p", completions=(Completion(text="4"),), columns={"reward_model.ground_truth": "4"})
    assert given(rewards_of({"name": here(graded)}).score([nested])) == [[1.0]]
    SCRIPT.append([2.0])
    rewards_of({"name": here(scripted)}).score([nested])
    assert CALLS[0]["reward_model.ground_truth"] == ["4"]


def test_a_function_is_tried_on_a_rows_columns_while_rows_are_read() -> None:
    config = scorer_class(here(distance)).model_validate({"name": here(distance), "kwargs": {"factor": 1}})
    config.check_row({"answer": "4"})
    with pytest.raises(RewardError, match=r"missing a required argument: 'answer'.*data\.keep names \(other\)"):
        config.check_row({"other": 1})


def test_a_scorer_whose_column_no_source_keeps_is_refused_before_anything_starts() -> None:
    tree = {**GOOD, "algorithm": {"name": "grpo"}, "rewards": [{"name": "exact_number", "column": "solution"}]}
    with pytest.raises(ConfigError, match=r"exact_number compares with the column 'solution'.*data\.keep"):
        check_config(tree, kind=RunConfig)
    check_config({**tree, "data": {"path": "x", "keep": ["solution"]}}, kind=RunConfig)
    mixture = [{"path": "x", "keep": ["solution"]}, {"path": "y"}]
    check_config({**tree, "data": {"mixture": mixture}}, kind=RunConfig)


class Moody(Rule):
    """Fails on some texts, as the code of someone else may."""

    name: str = "moody"

    def reward(self, completion: Completion, group: Group) -> float:
        if completion.text == "bug":
            return len(None)  # type: ignore[arg-type]
        if completion.text == "unreadable":
            raise Unreadable("it is in Welsh")
        return float(completion.text)


def test_a_rule_that_cannot_read_a_text_gives_what_is_configured_and_tells_the_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = group("2", "two", "unreadable", "3")
    assert given(rewards_of({"name": here(Moody)}).score([texts])) == [[2, 0, 0, 3]]
    (told,) = (record.message for record in caplog.records)
    assert told.endswith("such texts get 0 (on_unreadable)") and "ValueError" in told
    assert given(rewards_of({"name": here(Moody), "on_unreadable": -1}).score([texts])) == [[2, -1, -1, 3]]
    with pytest.raises(RewardError, match=r"scorer Moody: group rows.jsonl:7: it is in Welsh; on_unreadable may give"):
        rewards_of({"name": here(Moody), "on_unreadable": "fail"}).score([group("unreadable")])
    with pytest.raises(TypeError):  # a fault of the rule's code is none of the text
        rewards_of({"name": here(Moody)}).score([group("bug")])


def test_only_the_groups_without_sound_rewards_are_asked_about_again() -> None:
    SCRIPT.append([1.0, math.nan, 3.0, 4.0])
    groups = [group("a", name="1"), group("b", "c", name="2"), group("d", name="3")]
    assert given(rewards_of({"name": here(scripted)}).score(groups)) == [[1.0], [1.0, 1.0], [4.0]]
    assert [call["completions"] for call in CALLS] == [["a", "b", "c", "d"], ["b", "c"]]


def test_rewards_are_clipped_weighted_and_summed_and_the_breakdown_is_kept() -> None:
    settings = [
        {"name": here(Constant), "value": 40, "clip": 10, "weight": 0.5},
        {"name": here(Constant), "value": -40, "clip": 10, "weight": -1},
        {"name": "length", "target": 2},
        {"name": here(Constant), "value": 0.25},
    ]
    rewards = rewards_of(*settings)
    assert rewards.names == ["Constant", "Constant-2", "length", "Constant-3"]
    ((completion,),) = (each.completions for each in rewards.score([group("one two")]))
    assert completion.scores == {"Constant": 40.0, "Constant-2": -40.0, "length": 1.0, "Constant-3": 0.25}
    assert completion.reward == 5 + 10 + 1 + 0.25


def test_a_scorer_of_ones_own_is_asked_again_as_well() -> None:
    with pytest.raises(RewardError, match="scorer Constant: group 1 and 1 more: bad luck, after 3 attempts"):
        rewards_of({"name": here(Constant), "value": 13}).score([group("a", name="1"), group("b", name="2")])


def test_closing_closes_every_scorer_also_when_a_later_one_cannot_be_made() -> None:
    ConstantScorer.closed = 0
    rewards = rewards_of({"name": here(Constant)}, {"name": here(Constant)})
    rewards.close()
    assert ConstantScorer.closed == 2
    with pytest.raises(ConfigError, match="RAYLIGN_NO_SUCH_KEY"):
        rewards_of({"name": here(Constant)}, {"name": "http", "url": "http://x/", "key_env": "RAYLIGN_NO_SUCH_KEY"})
    assert ConstantScorer.closed == 3


def test_without_scorers_or_groups_nothing_changes() -> None:
    groups = [group("a")]
    assert rewards_of().score(groups) == groups
    assert rewards_of({"name": "length", "target": 2}).score([]) == []


def score_shared_groups(world: World) -> tuple[list[Group], list[str]]:
    """Five groups rated by two scorers, and the texts that the function was asked about."""
    groups = [group("x" * i, "y" * (i + 1), name=str(i)) for i in range(1, 6)]
    rewards = rewards_of({"name": here(scripted)}, {"name": "length", "unit": "characters", "target": 3, "weight": 10})
    rated = rewards.score(groups, world=world)
    return rated, [text for call in CALLS for text in call["completions"]]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
        {"question": "p", "response_j": "a", "response_k": "b"},
        {"prompt": "p", "completions": ["a", "b"], "rewards": [1, 0]},
        {"prompt": "p", "completion": "a", "label": True},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]},
        {"text": "a"},
        {"prompt": "p"},
    ],
)
def test_kept_columns_stay_beside_every_shape(row: dict[str, Any]) -> None:
    kept = {"answer": "#### 4", "extra": [1, None]}
    source = SourceConfig(path="rows.jsonl", keep=("answer", "extra"))
    assert to_group({**row, **kept, "other": 1}, "rows.jsonl:7", source).columns == kept
    assert to_group({**row, **kept}, "rows.jsonl:7", SourceConfig(path="rows.jsonl")).columns == {}
    with pytest.raises(DataError, match=r"^column 'extra' \(keep\) is missing$"):
        to_group({**row, "answer": None}, "rows.jsonl:7", source)


def _on_worker(world: World, bad: str | None) -> Any:
    """One of several workers, in a process of its own."""
    if bad is not None:
        SCRIPT.extend([lambda texts: [math.nan if text == bad else 0.0 for text in texts]] * 9)
    try:
        return score_shared_groups(world)
    except RewardError as error:
        return str(error)


def _on_two_workers(bad: str | None) -> list[Any]:
    return [ended.result for ended in run_two(_on_worker, (bad,), (bad,))]


def test_workers_share_the_asking_and_all_end_with_everything() -> None:
    alone, asked_alone = score_shared_groups(World())
    first, second = _on_two_workers(None)
    assert first[0] == second[0] == alone
    assert first[1] and second[1]
    assert sorted(first[1] + second[1]) == sorted(asked_alone)


def test_an_error_of_one_worker_is_raised_by_all_of_them() -> None:
    first, second = _on_two_workers("yyy")
    assert first == second
    assert first.endswith(
        "scorer scripted: group 2, completion 2 of 2: the reward is nan, not a number, after 3 attempts"
    )
    assert first.startswith("worker ")


GOOD = {"name": "run", "steps": 3, "data": {"path": "x"}}


def problems(*scorers: Any) -> list[str]:
    tree = {**GOOD, "algorithm": {"name": "grpo"}, "rewards": list(scorers)}
    with pytest.raises(ConfigError) as caught:
        check_config(tree, kind=RunConfig)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        ({"name": "lenght", "target": 3}, "rewards: there is no scorer 'lenght'; did you mean 'length'?"),
        ({"name": "zzzz"}, f"rewards: there is no scorer 'zzzz'; known are {', '.join(scorer_names())}"),
        ({"target": 3}, "rewards: needs a name: "),
        ("length", "rewards: a section is wanted: write {name: length}"),
        ("my.own:function", 'rewards: a section is wanted: write {name: "my.own:function"}'),
        ({"name": "no.such:thing"}, "rewards: scorer 'no.such:thing' cannot be imported: No module named 'no'"),
        ({"name": "json:nothing"}, "rewards: scorer 'json:nothing' cannot be imported: "),
        ({"name": ":nothing"}, "rewards: scorer ':nothing' cannot be imported: "),
        ({"name": "math:pi"}, "rewards: scorer 'math:pi' is a float, not a function"),
        ({"name": "json:JSONDecoder"}, "rewards: scorer 'json:JSONDecoder' is neither a function nor a subclass"),
        ({"name": "os.path:basename"}, "rewards: os.path:basename: os.path:basename(p) cannot be called with prompts="),
        ({"name": "length", "targte": 3, "target": 2}, "rewards: length: targte: unknown key; did you mean 'target'?"),
        (
            {"name": "length", "target": 0},
            "rewards: length: target: Input should be greater than or equal to 1 (given: 0)",
        ),
        ({"name": "length"}, "rewards: length: length needs target, max_length or both"),
        ({"name": "regex", "pattern": "("}, "rewards: regex: pattern: is not a regular expression: missing )"),
        ({"name": "http", "url": "ftp://x/"}, "rewards: http: url: must be http://HOST/PATH"),
        ({"name": "http", "url": "http://u:secret@x/"}, "rewards: http: url: must be http://HOST/PATH"),
        ({"name": "model"}, "rewards: model: path: is required and missing"),
    ],
)
def test_a_wrong_scorer_is_refused_with_its_name_and_key(scorer: Any, expected: str) -> None:
    (problem,) = problems(scorer)
    assert problem.startswith(expected)


def test_scorers_survive_the_way_to_a_worker() -> None:
    tree = {
        **GOOD,
        "algorithm": {"name": "grpo"},
        "rewards": [{"name": "length", "target": 3, "weight": -1}, {"name": here(scripted), "kwargs": {"a": [1]}}],
        "eval_rewards": [{"name": "model", "path": "somewhere"}],
    }
    config = check_config(tree, kind=RunConfig)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert [type(scorer).__name__ for scorer in config.rewards] == ["Length", "RewardFunction"]


def test_the_schema_knows_every_scorer_and_describes_every_key() -> None:
    schema = json_schema(RunConfig)
    check = jsonschema.Draft202012Validator(schema)
    good = {**GOOD, "algorithm": {"name": "dpo"}}
    for right in ({"name": "length", "target": 3}, {"name": "my.own:function", "kwargs": {}}, {"name": "sentiment"}):
        assert check.is_valid({**good, "rewards": [right], "eval_rewards": [right]}), right
    for wrong in ({"name": "lenght"}, {"name": "length", "targte": 3}, {"name": "regex"}, {"weight": 1}):
        assert not check.is_valid({**good, "rewards": [wrong]}), wrong
        assert not check.is_valid({**good, "eval_rewards": [wrong]}), wrong
    alternatives = schema["properties"]["rewards"]["items"]["anyOf"]
    assert len(alternatives) == len(scorer_names()) + 1
    undescribed = [
        (alternative["title"], key)
        for alternative in alternatives[1:]
        for key, field in alternative["properties"].items()
        if not field.get("description")
    ]
    assert undescribed == []


def test_a_line_in_a_module_of_rewards_makes_a_scorer_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from alignment.rewards import rules
    from alignment.settings.plugins import builtin_scorers

    class Shortness(rules.Length):
        name: Literal["shortness"] = "shortness"

    monkeypatch.setitem(rules.SCORERS, "shortness", Shortness)
    builtin_scorers.cache_clear()
    try:
        assert scorer_class("shortness") is Shortness
        with pytest.raises(ConfigError, match="did you mean 'shortness'"):
            scorer_class("shortnes")
    finally:
        builtin_scorers.cache_clear()


def test_checking_a_configuration_with_scorers_needs_no_torch() -> None:
    code = (
        "import json, sys\n"
        "from alignment.settings.plugins import scorer_class, scorer_names\n"
        "classes = [scorer_class(name) for name in scorer_names()]\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "httpx"} & set(json.loads(done.stdout))
