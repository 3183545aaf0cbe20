"""What the stored judgements amount to, counted by the database."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from serving.store.records import Agreement, Statistics, Wins
from serving.store.tables import answers, groups, judgements

COUNTS = judgements.c.superseded_by.is_(None)
IS_CHOICE = judgements.c.kind == "choice"


def statistics_of(connection: Connection) -> Statistics:
    """Counts of everything; call it in a transaction, so that they belong together."""
    comparisons = sa.select(sa.func.count()).where(groups.c.kind == "comparison")
    judged = sa.select(sa.func.count(judgements.c.group_number.distinct())).join(groups)
    return Statistics(
        answers=connection.execute(sa.select(sa.func.count()).select_from(answers)).scalar_one(),
        comparisons=connection.execute(comparisons).scalar_one(),
        judged=connection.execute(judged.where(groups.c.kind == "comparison", IS_CHOICE, COUNTS)).scalar_one(),
        by_kind=_by(connection, judgements.c.kind),
        by_labeller=_by(connection, judgements.c.labeller),
        agreement=_agreement(connection),
        wins_by_version=_wins(connection),
    )


def _by(connection: Connection, column: sa.Column[str]) -> dict[str, int]:
    query = sa.select(column, sa.func.count()).where(COUNTS).group_by(column).order_by(column)
    return {name: count for name, count in connection.execute(query)}


def _agreement(connection: Connection) -> Agreement:
    """Every labeller has one choice per group that counts; n equal ones are n (n - 1) / 2 pairs that agree."""
    count = sa.func.count()
    same = [
        sa.select(count.label("n")).where(IS_CHOICE, COUNTS).group_by(*columns).subquery()
        for columns in ((judgements.c.group_number,), (judgements.c.group_number, judgements.c.verdict))
    ]
    pairs, agreed = (
        int(connection.execute(sa.select(sa.func.sum(each.c.n * (each.c.n - 1) // 2))).scalar() or 0) for each in same
    )
    return Agreement(pairs=pairs, agreed=agreed, rate=agreed / pairs if pairs else None)


def _wins(connection: Connection) -> dict[int, Wins]:
    mine, other = answers.alias(), answers.alias()
    same_group = other.c.group_number == mine.c.group_number
    tied = judgements.c.verdict.in_(('"tie"', '"both_bad"'))
    won = judgements.c.verdict == sa.cast(mine.c.position, sa.Text)
    query = (
        sa.select(mine.c.version, _number(won), _number(~(won | tied)), _number(tied))
        .join_from(judgements, mine, mine.c.group_number == judgements.c.group_number)
        .join(other, same_group & (other.c.version != mine.c.version))
        .where(IS_CHOICE, COUNTS)
        .group_by(mine.c.version)
        .order_by(mine.c.version)
    )
    return {
        version: Wins(wins=wins, losses=losses, ties=ties) for version, wins, losses, ties in connection.execute(query)
    }


def _number(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.sum(sa.case((condition, 1), else_=0))
