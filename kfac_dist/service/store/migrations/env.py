"""Runs the migrations for alembic, on the connection and in the transaction of `open_store`."""

from __future__ import annotations

from alembic import context

from kfac_dist.service.store.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite alters a table by copying it into a new one
)
context.run_migrations()
