"""Turns what a person said about an answer into a stored row with its training row.

The table is called `judgements`, and the ids begin with `jdg-`: databases of earlier releases have these names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from serving.feedback.store.records import (
    BadVerdict,
    Choice,
    Conflict,
    Correction,
    Feedback,
    Ranking,
    Receipt,
    Thumb,
    UnknownId,
    UnknownIndex,
    Verdict,
)
from serving.feedback.store.tables import answers, groups, idempotency, judgements

Row = sa.Row[*tuple[Any, ...]]

TIES = {"tie": 0.5, "both_bad": 0.0}
"""The reward of each of two answers when neither is better."""

# These statements are built once: building one costs several times as much as executing it.
C = judgements.c
ANSWERS_BY_ID = (
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
INSERT = sa.insert(judgements).returning(*C)
SUPERSEDE = sa.update(judgements).where(C.number == sa.bindparam("older")).values(superseded_by=sa.bindparam("newer"))
REMEMBER_KEY = sa.insert(idempotency)


def record_feedback(connection: Connection, feedback: Feedback, created_at: float) -> Receipt:
    """Stores feedback once. The same feedback a second time gets the receipt of the first time.

    Args:
        created_at: UTC, Unix seconds.

    Raises:
        UnknownId: the service did not issue its target.
        BadVerdict: the verdict does not fit the target.
        Conflict: the idempotency key came with another content before.
    """
    target = _find_target(connection, feedback.target)
    values = _values(target, feedback, created_at)
    key_values = {"labeller": feedback.labeller, "key": feedback.key}
    row = connection.execute(BY_KEY, key_values).one_or_none() if feedback.key is not None else None
    if row is not None and not _is_same(row, values):
        raise Conflict("This idempotency key was used for another judgement; use a new one for each")
    if row is None:
        row = _insert(connection, values)
        if feedback.key is not None:
            connection.execute(REMEMBER_KEY, key_values | {"judgement_number": row.number})
    return Receipt(
        id=feedback_id(row.number),
        kind=row.kind,
        target=target.id if row.position is None else f"{target.id}-{row.position}",
        created=row.created,
        replaces=None if row.replaces is None else feedback_id(row.replaces),
        note=None if target.prompt is not None else f"Nothing is learned from this: {target.explanation}.",
    )


def feedback_id(number: int) -> str:
    """Returns the id of a piece of feedback, from the number of its row."""
    return f"jdg-{number}"


@dataclass(frozen=True, kw_only=True)
class _RewardedText:
    """A text of a training row with its reward."""

    text: str | None
    """None if texts are not kept."""
    reward: float
    version: int | None
    """Number of the model version that wrote it; None if a person did."""
    finish_reason: str | None = None
    """Why it ended, as OpenAI calls it: after `length` no end token is learned. None for a person's text."""


@dataclass(frozen=True, kw_only=True)
class _StoredAnswer:
    """An answer of the service, as the database has it."""

    position: int
    """Index of the answer in its group, from 0."""
    text: str | None
    version: int
    finish_reason: str | None

    def with_reward(self, reward: float) -> _RewardedText:
        """Returns the answer as a text of a training row."""
        return _RewardedText(text=self.text, reward=reward, version=self.version, finish_reason=self.finish_reason)


@dataclass(frozen=True, kw_only=True)
class _FeedbackTarget:
    """What feedback is about: a group, or one answer of a group."""

    number: int
    id: str
    """Id of the group."""
    prompt: Any
    """The prompt as JSON has it; None if texts are not kept."""
    reason: str | None
    """Why texts are not kept."""
    answers: tuple[_StoredAnswer, ...]
    position: int | None
    """Index of the answer that the feedback is about; None for the whole group."""

    @property
    def explanation(self) -> str:
        """Why the texts are not kept, as a clause for people."""
        return f"the texts were not kept, since {self.reason or 'feedback.record was off'}"

    @property
    def ids(self) -> list[str]:
        """Ids of the answers."""
        return [f"{self.id}-{answer.position}" for answer in self.answers]


def _find_target(connection: Connection, id: str) -> _FeedbackTarget:
    """Returns what the service issued under an id, which may be any text.

    Raises:
        UnknownIndex: the service issued the group, without an answer of this index.
        UnknownId: the service issued nothing under this id.
    """
    if id.isascii() and id.isprintable():  # no id of ours is different, and PostgreSQL refuses some texts
        stem, _, tail = id.rpartition("-")
        rows = connection.execute(ANSWERS_BY_ID, {"id": id, "stem": stem}).all()
        group_rows, answer_rows = ([row for row in rows if row.id == name] for name in (id, stem))
        if group_rows:
            return _target(group_rows, None)
        for row in answer_rows:
            if str(row.position) == tail:
                return _target(answer_rows, row.position)
        if answer_rows:
            ids = _target(answer_rows, None).ids
            raise UnknownIndex(f"This answer is not there; those that were given together are {', '.join(ids)}"[:500])
    raise UnknownId("The service has issued nothing under this id")


def _target(rows: list[Row], position: int | None) -> _FeedbackTarget:
    group_answers = (
        _StoredAnswer(
            position=row.position, text=_parse(row.text), version=row.version, finish_reason=row.finish_reason
        )
        for row in rows
    )
    group = rows[0]
    return _FeedbackTarget(
        number=group.number,
        id=group.id,
        prompt=_parse(group.prompt),
        reason=group.reason,
        answers=tuple(group_answers),
        position=position,
    )


def _parse(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _values(target: _FeedbackTarget, feedback: Feedback, created_at: float) -> dict[str, Any]:
    """Returns the columns of the row that stores the feedback."""
    interpretation = _interpret(target, feedback.verdict)
    comment = feedback.comment if target.prompt is not None else None
    return {
        "group_number": target.number,
        "position": interpretation.position,
        "kind": feedback.verdict.kind,
        "verdict": json.dumps(interpretation.value),
        "comment": None if comment is None else json.dumps(comment),
        "labeller": feedback.labeller,
        "created": created_at,
        "row": _training_row(target, feedback, interpretation.texts, created_at),
    }


@dataclass(frozen=True, kw_only=True)
class _Interpretation:
    """What a verdict means for its target."""

    position: int | None
    """Index of the answer that it is about; None if it is about all answers."""
    value: bool | int | str | list[int]
    """The verdict as it is stored; it names answers by their positions."""
    texts: tuple[_RewardedText, ...]
    """The texts of the training row, the best first."""


def _interpret(target: _FeedbackTarget, verdict: Verdict) -> _Interpretation:
    match verdict:
        case Choice():
            return _interpret_choice(target, verdict)
        case Ranking():
            return _interpret_ranking(target, verdict)
        case Thumb():
            answer = _single_answer(target)
            texts = (answer.with_reward(float(verdict.up)),)
            return _Interpretation(position=answer.position, value=verdict.up, texts=texts)
        case Correction():
            return _interpret_correction(target, verdict)


def _interpret_choice(target: _FeedbackTarget, verdict: Choice) -> _Interpretation:
    _check_whole(target, verdict)
    if len(target.answers) != 2:
        raise BadVerdict(f"a choice is between two answers, and {target.id} has {len(target.answers)}")
    if verdict.winner in TIES:
        texts = tuple(answer.with_reward(TIES[verdict.winner]) for answer in target.answers)
        return _Interpretation(position=None, value=verdict.winner, texts=texts)
    if verdict.winner not in target.ids:
        raise BadVerdict(f"winner must be {', '.join((*target.ids, *TIES))}")
    winner = target.ids.index(verdict.winner)
    texts = (target.answers[winner].with_reward(1.0), target.answers[1 - winner].with_reward(0.0))
    return _Interpretation(position=None, value=winner, texts=texts)


def _interpret_ranking(target: _FeedbackTarget, verdict: Ranking) -> _Interpretation:
    _check_whole(target, verdict)
    if len(target.answers) < 2 or sorted(verdict.order) != sorted(target.ids):
        raise BadVerdict(f"order must name every answer of {target.id} once, and there must be two at least")
    positions = [target.ids.index(id) for id in verdict.order]
    max_rank = len(positions) - 1
    texts = tuple(
        target.answers[position].with_reward((max_rank - rank) / max_rank) for rank, position in enumerate(positions)
    )
    return _Interpretation(position=None, value=positions, texts=texts)


def _interpret_correction(target: _FeedbackTarget, verdict: Correction) -> _Interpretation:
    answer = _single_answer(target)
    if target.prompt is None:
        raise BadVerdict(f"a correction cannot be kept: {target.explanation}")
    if not verdict.text.strip():
        raise BadVerdict("the corrected text is empty")
    correction = _RewardedText(text=verdict.text, reward=1.0, version=None)
    texts = (answer.with_reward(0.0), correction)
    return _Interpretation(position=answer.position, value=verdict.text, texts=texts)


def _single_answer(target: _FeedbackTarget) -> _StoredAnswer:
    """Returns the answer that the id names, or the only answer of its group; raises BadVerdict if there are more."""
    if target.position is not None:
        return target.answers[target.position]
    if len(target.answers) != 1:
        raise BadVerdict(f"{target.id} has {len(target.answers)} answers; give the id of one, as {target.id}-0")
    return target.answers[0]


def _check_whole(target: _FeedbackTarget, verdict: Verdict) -> None:
    """Raises BadVerdict if the id names one answer, and not their group."""
    if target.position is not None:
        raise BadVerdict(f"a {verdict.kind} is about all answers; give {target.id}")


def _training_row(
    target: _FeedbackTarget, feedback: Feedback, texts: tuple[_RewardedText, ...], created_at: float
) -> str | None:
    """Returns the training row without its id; None if texts are not kept, or one is empty, which teaches nothing."""
    if target.prompt is None or not all(entry.text and entry.text.strip() for entry in texts):
        return None
    row = {
        "prompt": target.prompt,
        "completions": [entry.text for entry in texts],
        "rewards": [entry.reward for entry in texts],
        "finish_reasons": [entry.finish_reason for entry in texts],
        "labeller": feedback.labeller,
        "kind": feedback.verdict.kind,
        "versions": [entry.version for entry in texts],
        "created": created_at,
    }
    return json.dumps(row)


def _insert(connection: Connection, values: dict[str, Any]) -> Row:
    """Returns the row of the labeller's feedback of this kind on this target.

    It is the row that counts already, if that says the same. Else it is a new row, which supersedes the other.
    """
    active = connection.execute(ACTIVE, values).one_or_none()
    if active is None:
        return connection.execute(INSERT, values).one()
    if _is_same(active, values):
        return active
    row = connection.execute(INSERT, values | {"replaces": active.number}).one()
    connection.execute(SUPERSEDE, {"older": active.number, "newer": row.number})
    return row


def _is_same(row: Row, values: dict[str, Any]) -> bool:
    """Returns whether a stored row has the same target, verdict and comment."""
    names = ("group_number", "position", "kind", "verdict", "comment")
    return all(row._mapping[name] == values[name] for name in names)
