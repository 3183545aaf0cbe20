"""From what a person said to a stored judgement and its training row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from serving.store.records import (
    BadVerdict,
    Choice,
    Conflict,
    Correction,
    Judgement,
    Ranking,
    Receipt,
    Thumb,
    UnknownId,
    Verdict,
)
from serving.store.tables import answers, groups, idempotency, judgements

Row = sa.Row[*tuple[Any, ...]]

TIES = {"tie": 0.5, "both_bad": 0.0}
"""What each of two answers is worth when neither is better."""

# Built once: building a statement costs several times as much as carrying it out.
C = judgements.c
ISSUED = (
    sa.select(
        groups.c.number,
        groups.c.id,
        groups.c.prompt,
        groups.c.reason,
        answers.c.position,
        answers.c.text,
        answers.c.version,
        answers.c.finish_reason,
    )
    .join_from(groups, answers)
    .where((groups.c.id == sa.bindparam("id")) | (groups.c.id == sa.bindparam("stem")))
    .order_by(answers.c.position)
)
BY_KEY = (
    sa.select(judgements)
    .join(idempotency)
    .where(idempotency.c.labeller == sa.bindparam("labeller"), idempotency.c.key == sa.bindparam("key"))
)
ACTIVE = sa.select(judgements).where(
    *(C[name] == sa.bindparam(name) for name in ("group_number", "labeller", "kind")),
    C.position.is_not_distinct_from(sa.bindparam("position")),
    C.superseded_by.is_(None),
)
STORE = sa.insert(judgements).returning(*C)
SUPERSEDE = sa.update(judgements).where(C.number == sa.bindparam("older")).values(superseded_by=sa.bindparam("newer"))
REMEMBER_KEY = sa.insert(idempotency)


def judge(connection: Connection, judgement: Judgement, now: float) -> Receipt:
    """Stores a judgement, once: the same one again gets the receipt that it has.

    Args:
        now: UTC, Unix seconds.

    Raises:
        UnknownId: the service did not issue its target.
        BadVerdict: it does not fit its target.
        Conflict: its idempotency key came with another content before.
    """
    target = _find(connection, judgement.target)
    values = _values(target, judgement, now)
    given = {"labeller": judgement.labeller, "key": judgement.key}
    stored = connection.execute(BY_KEY, given).one_or_none() if judgement.key is not None else None
    if stored is not None and not _says(stored, values):
        raise Conflict("This idempotency key was used for another judgement; use a new one for each")
    if stored is None:
        stored = _stored(connection, values)
        if judgement.key is not None:
            connection.execute(REMEMBER_KEY, given | {"judgement_number": stored.number})
    return Receipt(
        id=judgement_id(stored.number),
        kind=stored.kind,
        target=target.id if stored.position is None else f"{target.id}-{stored.position}",
        created=stored.created,
        replaces=None if stored.replaces is None else judgement_id(stored.replaces),
        note=None if target.prompt is not None else f"Nothing is learned from this: {target.why}.",
    )


def judgement_id(number: int) -> str:
    return f"jdg-{number}"


@dataclass(frozen=True, kw_only=True)
class _Graded:
    """A text of a training row."""

    text: str | None
    """None if texts are not kept."""
    reward: float
    version: int | None
    """What gave it; None is a person."""
    finish_reason: str | None = None
    """Why it ended, as OpenAI calls it: after `length` no end token is learned. None of a person's text."""


@dataclass(frozen=True, kw_only=True)
class _Answer:
    position: int
    text: str | None
    version: int
    finish_reason: str | None

    def worth(self, reward: float) -> _Graded:
        return _Graded(text=self.text, reward=reward, version=self.version, finish_reason=self.finish_reason)


@dataclass(frozen=True, kw_only=True)
class _Target:
    """What a judgement is about: a group, or one answer of it."""

    number: int
    id: str
    """Of the group."""
    prompt: Any
    """As JSON has it; None if texts are not kept."""
    reason: str | None
    """Why they are not."""
    answers: tuple[_Answer, ...]
    position: int | None
    """Of the answer; None for the whole group."""

    @property
    def why(self) -> str:
        """Why the texts are not kept, in words."""
        return f"the texts were not kept, since {self.reason or 'feedback.record was off'}"

    @property
    def ids(self) -> list[str]:
        """Of the answers."""
        return [f"{self.id}-{answer.position}" for answer in self.answers]


def _find(connection: Connection, id: str) -> _Target:
    """What the service issued under an id, whatever a client may send as one.

    Raises:
        UnknownId: nothing.
    """
    if id.isascii() and id.isprintable():  # all others are not ours, and PostgreSQL refuses some of them
        stem, _, tail = id.rpartition("-")
        rows = connection.execute(ISSUED, {"id": id, "stem": stem}).all()
        whole, part = ([row for row in rows if row.id == name] for name in (id, stem))
        if whole:
            return _target(whole, None)
        for row in part:
            if str(row.position) == tail:
                return _target(part, row.position)
    raise UnknownId("The service has issued nothing under this id")


def _target(rows: list[Row], position: int | None) -> _Target:
    of_group = (
        _Answer(position=row.position, text=_loaded(row.text), version=row.version, finish_reason=row.finish_reason)
        for row in rows
    )
    first = rows[0]
    return _Target(
        number=first.number,
        id=first.id,
        prompt=_loaded(first.prompt),
        reason=first.reason,
        answers=tuple(of_group),
        position=position,
    )


def _loaded(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _values(target: _Target, judgement: Judgement, now: float) -> dict[str, Any]:
    """The columns of a judgement."""
    reading = _read(target, judgement.verdict)
    comment = judgement.comment if target.prompt is not None else None
    return {
        "group_number": target.number,
        "position": reading.position,
        "kind": judgement.verdict.kind,
        "verdict": json.dumps(reading.said),
        "comment": None if comment is None else json.dumps(comment),
        "labeller": judgement.labeller,
        "created": now,
        "row": _row(target, judgement, reading.graded, now),
    }


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """A verdict on its target."""

    position: int | None
    """Of the answer that it is about; None if it is about all."""
    said: bool | int | str | list[int]
    """Answers are named by their positions."""
    graded: tuple[_Graded, ...]
    """The best first."""


def _read(target: _Target, verdict: Verdict) -> _Reading:
    match verdict:
        case Choice():
            return _read_choice(target, verdict)
        case Ranking():
            return _read_ranking(target, verdict)
        case Thumb():
            answer = _one(target)
            return _Reading(position=answer.position, said=verdict.up, graded=(answer.worth(float(verdict.up)),))
        case Correction():
            return _read_correction(target, verdict)


def _read_choice(target: _Target, verdict: Choice) -> _Reading:
    _check_whole(target, verdict)
    if len(target.answers) != 2:
        raise BadVerdict(f"a choice is between two answers, and {target.id} has {len(target.answers)}")
    if verdict.winner in TIES:
        graded = tuple(answer.worth(TIES[verdict.winner]) for answer in target.answers)
        return _Reading(position=None, said=verdict.winner, graded=graded)
    if verdict.winner not in target.ids:
        raise BadVerdict(f"winner must be {', '.join((*target.ids, *TIES))}")
    winner = target.ids.index(verdict.winner)
    graded = (target.answers[winner].worth(1.0), target.answers[1 - winner].worth(0.0))
    return _Reading(position=None, said=winner, graded=graded)


def _read_ranking(target: _Target, verdict: Ranking) -> _Reading:
    _check_whole(target, verdict)
    if len(target.answers) < 2 or sorted(verdict.order) != sorted(target.ids):
        raise BadVerdict(f"order must name every answer of {target.id} once, and there must be two at least")
    order = [target.ids.index(id) for id in verdict.order]
    last = len(order) - 1
    graded = tuple(target.answers[place].worth((last - rank) / last) for rank, place in enumerate(order))
    return _Reading(position=None, said=order, graded=graded)


def _read_correction(target: _Target, verdict: Correction) -> _Reading:
    answer = _one(target)
    if target.prompt is None:
        raise BadVerdict(f"a correction cannot be kept: {target.why}")
    if not verdict.text.strip():
        raise BadVerdict("the corrected text is empty")
    better = _Graded(text=verdict.text, reward=1.0, version=None)
    return _Reading(position=answer.position, said=verdict.text, graded=(answer.worth(0.0), better))


def _one(target: _Target) -> _Answer:
    if target.position is not None:
        return target.answers[target.position]
    if len(target.answers) != 1:
        raise BadVerdict(f"{target.id} has {len(target.answers)} answers; give the id of one, as {target.id}-0")
    return target.answers[0]


def _check_whole(target: _Target, verdict: Verdict) -> None:
    if target.position is not None:
        raise BadVerdict(f"a {verdict.kind} is about all answers; give {target.id}")


def _row(target: _Target, judgement: Judgement, graded: tuple[_Graded, ...], now: float) -> str | None:
    """The training row without its id; None if no text is kept, or one is empty, which teaches nothing."""
    if target.prompt is None or not all(each.text and each.text.strip() for each in graded):
        return None
    row = {
        "prompt": target.prompt,
        "completions": [each.text for each in graded],
        "rewards": [each.reward for each in graded],
        "finish_reasons": [each.finish_reason for each in graded],
        "labeller": judgement.labeller,
        "kind": judgement.verdict.kind,
        "versions": [each.version for each in graded],
        "created": now,
    }
    return json.dumps(row)


def _stored(connection: Connection, values: dict[str, Any]) -> Row:
    """The labeller's judgement of this kind and target: the one that counts already, or this one in its place."""
    active = connection.execute(ACTIVE, values).one_or_none()
    if active is None:
        return connection.execute(STORE, values).one()
    if _says(active, values):
        return active
    stored = connection.execute(STORE, values | {"replaces": active.number}).one()
    connection.execute(SUPERSEDE, {"older": active.number, "newer": stored.number})
    return stored


def _says(stored: Row, values: dict[str, Any]) -> bool:
    names = ("group_number", "position", "kind", "verdict", "comment")
    return all(stored._mapping[name] == values[name] for name in names)
