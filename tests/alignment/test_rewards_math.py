"""The rule `math` equals what mathematics equals, and no answer can hold it up, end it or fill the machine."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
import torch

from alignment.errors import RewardError
from alignment.groups import Completion, Group
from alignment.rewards import BuildableScorer, Rewards
from alignment.settings.plugins import scorer_class

EQUAL = [
    (r"4\sqrt{2}", r"so it is \boxed{\sqrt{32}}"),
    (r"4\sqrt{2}", r"\boxed{4√2}"),
    ("(1,2)", r"\boxed{(1, 2)}"),
    (r"\{1, 2\}", r"\boxed{\{2, 1\}}"),
    ("1/2", r"\boxed{\frac12}"),
    ("0.5", r"The answer is $\frac{1}{2}$."),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    (r"\frac{\pi}{2}", r"\boxed{π/2}"),
    ("[0, 1)", r"\boxed{[0,1)}"),
    (r"(-\infty, 3]", r"\boxed{(-∞, 3]}"),
    ("x=5", r"\boxed{5}"),
    (r"10\%", r"\boxed{10\%}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}"),
    ("3+4i", r"\boxed{4i + 3}"),
    (r"90^\circ", r"\boxed{90}"),
    (r"\text{Evelyn}", r"\boxed{Evelyn}"),
    ("1024", r"\boxed{2^{10}}"),
    ("1200", r"\boxed{1.2 × 10³}"),
    ("a long solution\n#### 72", "In the end there are 72 clips"),
    (r"so \boxed{\frac{7}{8}}", r"the answer is $\frac{14}{16}$"),
    ("1_000", r"\boxed{1_000}"),
    ("0x10", r"so it is $0x10$"),
    ("1e400", r"\boxed{1e400}"),
    (r"\infty", r"\boxed{\infty}"),
    ("1010_2", r"\boxed{1010_2}"),
]
UNEQUAL = [
    ("4", r"\boxed{4√2}"),
    ("(1,2)", r"\boxed{(2, 1)}"),
    ("2", r"\boxed{2^{10}}"),
    ("x^2+2x+1", r"\boxed{(x+1)^3}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix} 2 \\ 1 \end{pmatrix}}"),
    (r"\text{Evelyn}", r"\boxed{\text{Tom}}"),
    ("5", ""),
    ("5", r"\boxed{}"),
    ("5", r"\boxed{"),
    ("5", "\ud800 I cannot say"),
    ("5", r"\boxed{" + "9" * 5000 + "}"),
    ("5", "9" * 64_000),
    ("1", r"\boxed{1_000}"),
    ("1", "It is 1_000."),
    ("1_000", r"\boxed{1}"),
    ("1_000", "$1_001$"),
    ("0", r"\boxed{0x10}"),
    ("0", "$0b101$"),
    ("0x10", r"\boxed{0}"),
    ("0x10", "It is 0."),
    ("1", "It is 1e400."),
    ("400e", r"\boxed{1e400}"),
]


def group(right: Any, *texts: str) -> Group:
    return Group(
        id="rows:7", prompt="p", completions=tuple(Completion(text=text) for text in texts), columns={"answer": right}
    )


def config(**settings: Any) -> BuildableScorer:
    return scorer_class("math").model_validate({"name": "math", "processes": 1, **settings})


@pytest.fixture(scope="module")
def rewards() -> Iterator[Rewards]:
    rewards = Rewards([config(timeout_s=20)], torch.device("cpu"))  # a slow machine is no reason to fail
    yield rewards
    rewards.close()


def test_what_is_equal_in_mathematics_is_right_and_nothing_else(rewards: Rewards) -> None:
    pairs = [*EQUAL, *UNEQUAL]
    rated = rewards.score([group(right, text) for right, text in pairs])
    wrong = [
        pair
        for pair, each, wanted in zip(pairs, rated, [1] * len(EQUAL) + [0] * len(UNEQUAL), strict=True)
        if each.completions[0].reward != wanted
    ]
    assert not wrong


def test_it_works_in_any_thread(rewards: Rewards) -> None:
    rated: list[Group] = []
    thread = threading.Thread(target=lambda: rated.extend(rewards.score([group("x^2", r"\boxed{x \cdot x}", "4")])))
    thread.start()
    thread.join(60)
    assert [completion.reward for completion in rated[0].completions] == [1, 0]


def test_an_answer_that_takes_for_ever_gets_what_is_configured_and_the_next_is_compared() -> None:
    texts = (r"\boxed{10^{10^{10}} + x}", r"\boxed{y + x}")
    for on_unreadable in (-1.0, "fail"):
        rewards = Rewards([config(timeout_s=2, on_unreadable=on_unreadable)], torch.device("cpu"))
        started = time.monotonic()
        try:
            if on_unreadable == "fail":
                with pytest.raises(
                    RewardError, match="scorer math: group rows:7: an answer was not compared after 2 s"
                ):
                    rewards.score([group("x+y", texts[0])])
            else:
                (rated,) = rewards.score([group("x+y", *texts)])
                assert [completion.reward for completion in rated.completions] == [-1, 1]
        finally:
            rewards.close()
        assert time.monotonic() - started < 60


def test_columns_are_checked_while_rows_are_read() -> None:
    for right in (5, "5", r"\frac12", "#### 4", "no solution", r"x \ge 3", None):
        config(timeout_s=20).check_row({"answer": right})
    config(column="reward_model.ground_truth").check_row({"reward_model.ground_truth": "72"})
    for right, problem in (
        ({"ground_truth": "5"}, "holds no formula but a dict"),
        (["5"], "holds no formula but a list"),
        (True, "holds no formula but a bool"),
        ("", "holds no formula of at most"),
        ("x" * 2000, "holds no formula of at most"),
        (math.nan, "holds no formula but nan"),
        (-math.inf, "holds no formula but -inf"),
        (Decimal("Infinity"), "holds no formula but Infinity"),
        (10**5000, "holds no formula but an integer of too many digits"),
        ("NaN", "holds no formula but 'NaN'"),
        (r"\boxed{nan}", "holds no formula but 'nan'"),
        ("-inf", "holds no formula but '-inf'"),
        ("null", "holds no formula but 'null'"),
        ([], "holds no formula but a list"),
        (r"\boxed{}", "holds no formula that can be read"),
    ):
        with pytest.raises(RewardError, match=problem):
            config().check_row({"answer": right})
    config(timeout_s=20).verifier().close()  # type: ignore[attr-defined]


def test_the_library_is_loaded_only_by_the_processes_that_compare() -> None:
    code = "import sys, alignment.rewards.mathematics; assert not {'sympy', 'math_verify'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
