"""How alembic runs the migrations: on the connection, and in the transaction, it is given."""

from __future__ import annotations

from alembic import context

from kfac_dist.service.store.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite changes a table by making it anew
)
context.run_migrations()
