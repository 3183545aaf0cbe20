"""The tables of the feedback database. A change here needs a migration, or `test_store` fails.

Texts of people and models are stored as ASCII JSON: a NUL or half a surrogate pair would break PostgreSQL, and a line
separator the export. Ids of answers are not stored: they are `{groups.id}-{answers.position}`. Feedback is in the table
`judgements`, as earlier releases called it.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite counts rows by itself with this type alone


groups = sa.Table(
    "groups",
    metadata,
    sa.Column("number", NUMBER, primary_key=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("asked_by", sa.Text, nullable=False),
    sa.Column("created", sa.Double, nullable=False, index=True),
    sa.Column("prompt", sa.Text),  # JSON: a string or a list of messages; null if texts are not recorded
    sa.Column("reason", sa.Text),  # why texts are not recorded; null if they are, and in rows from before 0002
    sqlite_autoincrement=True,
)

answers = sa.Table(
    "answers",
    metadata,
    sa.Column("group_number", NUMBER, sa.ForeignKey("groups.number"), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("text", sa.Text),  # JSON: a string; null if texts are not recorded
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("finish_reason", sa.Text),
)

judgements = sa.Table(
    "judgements",
    metadata,
    sa.Column("number", NUMBER, primary_key=True),  # never used twice; `jdg-{number}` is the id
    sa.Column("group_number", NUMBER, sa.ForeignKey("groups.number"), nullable=False),
    sa.Column("position", sa.Integer),  # of the answer that it is about; null if it is about the group
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("verdict", sa.Text, nullable=False),  # JSON, answers by their positions
    sa.Column("comment", sa.Text),  # JSON: a string
    sa.Column("labeller", sa.Text, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("replaces", NUMBER),  # the labeller's earlier row of the same kind and target
    sa.Column("superseded_by", NUMBER),  # the later one; null if this is what counts
    sa.Column("row", sa.Text),  # JSON: the training row without its id; null if there is nothing to learn from
    sa.Index("ix_judgements_group_number_labeller", "group_number", "labeller"),
    sqlite_autoincrement=True,
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("labeller", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("judgement_number", NUMBER, sa.ForeignKey("judgements.number"), nullable=False, index=True),
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("revoked", sa.Double),
    sa.Column("expires", sa.Double),  # null: never
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("number", NUMBER, primary_key=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),  # the same entry again is none
    sa.Column("created", sa.Double, nullable=False, index=True),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("who", sa.Text, nullable=False),  # a key's name, or user@host of a command
    sa.Column("address", sa.Text),  # that a request came from; null of a command
    sa.Column("detail", sa.Text, nullable=False),  # JSON
    sqlite_autoincrement=True,
)
