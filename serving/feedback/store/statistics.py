"""Statistics of the stored feedback, counted by the database."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from serving.feedback.store.records import Agreement, Statistics, Wins
from serving.feedback.store.tables import answers, groups, judgements

COUNTS = judgements.c.superseded_by.is_(None)
IS_CHOICE = judgements.c.kind == "choice"


def statistics_of(connection: Connection, model: str | None = None) -> Statistics:
    """Counts everything. Call it in a transaction, so that the counts belong to one moment.

    Args:
        model: name of a model; only its answers, and the feedback on them, are counted.
    """
    is_own = sa.true() if model is None else answers.c.model == model
    comparisons = sa.select(sa.func.count()).where(groups.c.kind == "comparison", *_of_model(groups.c.number, model))
    num_groups = sa.select(sa.func.count(judgements.c.group_number.distinct())).join(groups)
    counts = (COUNTS, *_of_model(judgements.c.group_number, model))
    with_choice = num_groups.where(groups.c.kind == "comparison", IS_CHOICE, *counts)
    return Statistics(
        answers=connection.execute(sa.select(sa.func.count()).select_from(answers).where(is_own)).scalar_one(),
        comparisons=connection.execute(comparisons).scalar_one(),
        judged=connection.execute(with_choice).scalar_one(),
        by_kind=_counts_by(connection, judgements.c.kind, counts),
        by_labeller=_counts_by(connection, judgements.c.labeller, counts),
        agreement=_agreement(connection, counts),
        wins_by_version=_wins(connection, counts),
    )


def _of_model(group_number: sa.Column[int], model: str | None) -> list[sa.ColumnElement[bool]]:
    """Returns the condition that a group's answers are of a model; no condition without one."""
    if model is None:
        return []
    first_answer = answers.alias()
    is_first = (first_answer.c.group_number == group_number) & (first_answer.c.position == 0)
    return [sa.exists().where(is_first, first_answer.c.model == model)]


def _counts_by(
    connection: Connection, column: sa.Column[str], counts: Sequence[sa.ColumnElement[bool]]
) -> dict[str, int]:
    query = sa.select(column, sa.func.count()).where(*counts).group_by(column).order_by(column)
    return {name: count for name, count in connection.execute(query)}


def _agreement(connection: Connection, counts: Sequence[sa.ColumnElement[bool]]) -> Agreement:
    """Every labeller has one choice per group that counts; n equal choices are n (n - 1) / 2 pairs that agree."""
    count = sa.func.count()
    group_sizes = [
        sa.select(count.label("n")).where(IS_CHOICE, *counts).group_by(*columns).subquery()
        for columns in ((judgements.c.group_number,), (judgements.c.group_number, judgements.c.verdict))
    ]
    num_pairs, num_agreeing = (
        int(connection.execute(sa.select(sa.func.sum(sizes.c.n * (sizes.c.n - 1) // 2))).scalar() or 0)
        for sizes in group_sizes
    )
    return Agreement(pairs=num_pairs, agreed=num_agreeing, rate=num_agreeing / num_pairs if num_pairs else None)


def _wins(connection: Connection, counts: Sequence[sa.ColumnElement[bool]]) -> dict[int, Wins]:
    answer, opponent = answers.alias(), answers.alias()
    same_group = opponent.c.group_number == answer.c.group_number
    is_tie = judgements.c.verdict.in_(('"tie"', '"both_bad"'))
    is_win = judgements.c.verdict == sa.cast(answer.c.position, sa.Text)
    query = (
        sa.select(answer.c.version, _count_where(is_win), _count_where(~(is_win | is_tie)), _count_where(is_tie))
        .join_from(judgements, answer, answer.c.group_number == judgements.c.group_number)
        .join(opponent, same_group & (opponent.c.version != answer.c.version))
        .where(IS_CHOICE, *counts)
        .group_by(answer.c.version)
        .order_by(answer.c.version)
    )
    return {
        version: Wins(wins=wins, losses=losses, ties=ties) for version, wins, losses, ties in connection.execute(query)
    }


def _count_where(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.sum(sa.case((condition, 1), else_=0))
