"""The tables as they were in the beginning."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "groups",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("asked_by", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False, index=True),
        sa.Column("prompt", sa.Text),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "answers",
        sa.Column("group_number", NUMBER, sa.ForeignKey("groups.number"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("text", sa.Text),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("finish_reason", sa.Text),
    )
    op.create_table(
        "judgements",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("group_number", NUMBER, sa.ForeignKey("groups.number"), nullable=False),
        sa.Column("position", sa.Integer),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("verdict", sa.Text, nullable=False),
        sa.Column("comment", sa.Text),
        sa.Column("labeller", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("replaces", NUMBER),
        sa.Column("superseded_by", NUMBER),
        sa.Column("row", sa.Text),
        sa.Index("ix_judgements_group_number_labeller", "group_number", "labeller"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "idempotency",
        sa.Column("labeller", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("judgement_number", NUMBER, sa.ForeignKey("judgements.number"), nullable=False, index=True),
    )
    op.create_table(
        "keys",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("revoked", sa.Double),
    )
