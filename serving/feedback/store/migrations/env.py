"""Run by alembic: brings a database up to date inside the transaction that `serving.feedback.store.opening` holds."""

from __future__ import annotations

from alembic import context

from serving.feedback.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
