"""The division of a step between workers and forward passes: nothing is lost, and nobody waits long."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from alignment.data import packing
from alignment.groups import Completion, Group


def group_of(number: int, length: int) -> Group:
    completion = Completion(text="", tokens=(1,) * (length - 1), loss_mask=(True,) * (length - 1))
    return Group(id=str(number), prompt="", prompt_tokens=(0,), completions=(completion,))


def groups_of(*lengths: int) -> list[Group]:
    return [group_of(number, length) for number, length in enumerate(lengths)]


def share(groups: list[Group], *, rank: int, size: int) -> list[Group]:
    return [groups[i] for i in packing.share([group.num_tokens for group in groups], rank=rank, size=size)]


def micro_batches(groups: list[Group], *, max_tokens: int) -> list[list[Group]]:
    lengths = [group.num_tokens for group in groups]
    passes = packing.micro_batches(range(len(groups)), lengths, max_tokens=max_tokens)
    return [[groups[i] for i in part] for part in passes]


def random_groups(seed: int) -> list[Group]:
    """Up to 40 groups of 2 to 400 tokens, most of them short."""
    chance = random.Random(seed)
    return groups_of(*(int(2 * 200 ** chance.random()) for _ in range(chance.randrange(1, 41))))


def tokens(groups: list[Group]) -> int:
    return sum(group.num_tokens for group in groups)


def ids(groups: list[Group]) -> list[int]:
    return [int(group.id) for group in groups]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(8))
def test_workers_share_every_group_once_and_about_equally(seed: int, size: int) -> None:
    groups = random_groups(seed)
    shares = [share(groups, rank=rank, size=size) for rank in range(size)]
    assert sorted(i for part in shares for i in ids(part)) == ids(groups)
    assert all(ids(part) == sorted(ids(part)) for part in shares), "each keeps the given order"
    longest = max(group.num_tokens for group in groups)
    loads = [tokens(part) for part in shares]
    assert max(loads) - min(loads) <= longest


def test_workers_share_equal_groups_equally() -> None:
    groups = groups_of(*[7] * 12)
    assert [len(share(groups, rank=rank, size=4)) for rank in range(4)] == [3, 3, 3, 3]


def test_a_long_group_has_a_worker_for_itself() -> None:
    groups = groups_of(10, 100, 10, 10, 10)
    assert [ids(share(groups, rank=rank, size=2)) for rank in range(2)] == [[1], [0, 2, 3, 4]]


def test_more_workers_than_groups_leave_some_without() -> None:
    groups = groups_of(5, 6)
    assert [ids(share(groups, rank=rank, size=4)) for rank in range(4)] == [[1], [0], [], []]


def test_the_order_of_groups_does_not_change_who_gets_which() -> None:
    lengths = random.Random(0).sample(range(2, 300), 25)  # all different: nothing is left to the order
    groups = groups_of(*lengths)
    turned = random.Random(1).sample(groups, len(groups))
    for rank in range(3):
        assert sorted(ids(share(turned, rank=rank, size=3))) == ids(share(groups, rank=rank, size=3))
    passes = {frozenset(ids(part)) for part in micro_batches(groups, max_tokens=400)}
    assert {frozenset(ids(part)) for part in micro_batches(turned, max_tokens=400)} == passes


@pytest.mark.parametrize("max_tokens", [1, 50, 200, 1000, 10**9])
@pytest.mark.parametrize("seed", range(8))
def test_micro_batches_hold_every_group_once_and_only_a_long_group_exceeds_the_limit(
    seed: int, max_tokens: int
) -> None:
    groups = random_groups(seed)
    passes = micro_batches(groups, max_tokens=max_tokens)
    assert sorted(i for part in passes for i in ids(part)) == ids(groups)
    assert all(len(part) == 1 or tokens(part) <= max_tokens for part in passes)
    assert all(passes), "no forward pass is empty"
    if max_tokens > tokens(groups):
        assert len(passes) == 1


@pytest.mark.parametrize("seed", range(8))
def test_no_two_micro_batches_would_have_fitted_into_one(seed: int) -> None:
    loads = sorted(tokens(part) for part in micro_batches(random_groups(seed), max_tokens=300))
    assert all(a + b > 300 for a, b in pairwise(loads))


def test_nothing_is_cut_into_no_passes() -> None:
    assert micro_batches([], max_tokens=10) == []
    assert share([], rank=0, size=2) == []


def test_a_group_of_just_the_limit_is_not_alone_by_mistake() -> None:
    assert [ids(part) for part in micro_batches(groups_of(10, 6, 4, 5), max_tokens=10)] == [[0], [1, 2], [3]]
