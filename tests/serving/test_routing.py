"""Which replica a conversation goes to: always the same one, a fair share to each, and few move when one is gone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from serving.replica.routing import KEY_LENGTH, canary_answers, conversation_key, home_index

NAMES = [f"replica-{number}" for number in range(5)]
BEGUN = [f"conversation {number}" for number in range(2000)]


def chat(*contents: Any) -> tuple[Any, ...]:
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return ("chat", {"model": "m", "messages": turns}, None)


def test_later_turns_of_a_conversation_begin_like_the_first() -> None:
    first = conversation_key(chat("Be kind.", "Hello"))
    assert first == conversation_key(chat("Be kind.", "Hello", "Hi!", "How are you?"))
    assert first != conversation_key(chat("Be kind.", "Good-bye"))
    assert first != conversation_key(chat("Be rude.", "Hello"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), None),
        ((3, None), None),
        (("completions", {"prompt": "abc"}, None), "abc"),
        (("completions", {"prompt": "a" * 5000}, None), "a" * KEY_LENGTH),
        (("completions", {"prompt": [1, 2]}, None), "[1, 2]"),
        (("chat", {"messages": [{"role": "assistant", "content": "I"}]}, None), "I"),
        (chat("", [{"type": "text", "text": "parts"}]), "[{'type': 'text', 'text': 'parts'}]"),
    ],
)
def test_the_beginning_of_anything_that_can_be_asked(arguments: tuple[Any, ...], expected: str | None) -> None:
    assert conversation_key(arguments) == expected


def test_each_replica_is_home_to_its_share() -> None:
    shares = Counter(home_index(begun, NAMES) for begun in BEGUN)
    assert all(300 < shares[place] < 500 for place in range(len(NAMES)))


def test_when_a_replica_goes_only_its_conversations_move() -> None:
    left = NAMES[:2] + NAMES[3:]
    for begun in BEGUN:
        before, after = NAMES[home_index(begun, NAMES)], left[home_index(begun, left)]
        assert before in (after, NAMES[2])


def test_a_canary_gets_its_share_of_the_conversations() -> None:
    for share in (0.05, 0.3, 0.9):
        count = sum(canary_answers(begun, 2, share) for begun in BEGUN)
        deviation = (len(BEGUN) * share * (1 - share)) ** 0.5
        assert abs(count - len(BEGUN) * share) < 4 * deviation
    assert not any(canary_answers(begun, 2, 0.0) for begun in BEGUN)


def test_a_larger_share_keeps_the_conversations_of_a_smaller_one_and_another_canary_gets_others() -> None:
    few, many = ({begun for begun in BEGUN if canary_answers(begun, 2, share)} for share in (0.1, 0.4))
    assert few < many
    others = {begun for begun in BEGUN if canary_answers(begun, 3, 0.1)}
    assert len(few & others) < len(few) / 2


def test_every_turn_of_a_conversation_has_one_version() -> None:
    for place in range(50):
        turns = [
            conversation_key(chat("Be kind.", f"Hello {place}", *rest))
            for rest in ((), ("Hi!", "More"), ("Yes?", "No"))
        ]
        assert len({canary_answers(str(begun), 2, 0.5) for begun in turns}) == 1
