"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_FLOAT = sa.Float(53)


def upgrade() -> None:
    """Create the tables."""
    _create_jobs()
    _create_attempts_and_events()
    _create_metrics()
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("created_at", _FLOAT, nullable=False),
        sa.Column("expires_at", _FLOAT),
        sa.Column("revoked_at", _FLOAT),
        sa.Column("last_used_at", _FLOAT),
    )


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("number", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(120), nullable=False, unique=True),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("idempotency_key", sa.String(200)),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("state_since", _FLOAT, nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("message", sa.Text()),
        sa.Column("first_failure", sa.JSON()),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("num_restarts", sa.BigInteger(), nullable=False),
        sa.Column("cancel_now", sa.Boolean(), nullable=False),
        sa.Column("priority", sa.BigInteger(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("num_steps", sa.BigInteger(), nullable=False),
        sa.Column("created_at", _FLOAT, nullable=False),
        sa.Column("updated_at", _FLOAT, nullable=False),
        sa.Column("started_at", _FLOAT),
        sa.Column("ended_at", _FLOAT),
        sa.Column("run_dir", sa.Text(), nullable=False),
        sa.Column("data_dir", sa.Text()),
        sa.Column("package", sa.String(64)),
        sa.Column("summary", sa.JSON()),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.Column("events_known", sa.BigInteger(), nullable=False),
        sa.Column("steps_known", sa.BigInteger(), nullable=False),
        sa.UniqueConstraint("owner", "idempotency_key", name="jobs_idempotency"),
    )
    for column in ("state", "owner", "name"):
        op.create_index(f"jobs_by_{column}", "jobs", [column, "number"])


def _create_attempts_and_events() -> None:
    op.create_table(
        "attempts",
        sa.Column("job", _NUMBER, sa.ForeignKey("jobs.number"), primary_key=True),
        sa.Column("number", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("message", sa.Text()),
        sa.Column("started_at", _FLOAT, nullable=False),
        sa.Column("ended_at", _FLOAT),
        sa.Column("heard_at", _FLOAT),
        sa.Column("resumed_from_step", sa.BigInteger()),
        sa.Column("token_sha256", sa.String(64), nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("job", _NUMBER, sa.ForeignKey("jobs.number"), primary_key=True),
        sa.Column("sequence", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("time", _FLOAT, nullable=False),
        sa.Column("severity", sa.String(20), nullable=False),
        sa.Column("role", sa.Text()),
        sa.Column("rank", sa.BigInteger()),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
    )


def _create_metrics() -> None:
    op.create_table(
        "metric_series",
        sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("job", _NUMBER, sa.ForeignKey("jobs.number"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.UniqueConstraint("job", "name", name="metric_series_of_job"),
    )
    op.create_table(
        "metric_points",
        sa.Column("series", _NUMBER, sa.ForeignKey("metric_series.id"), primary_key=True),
        sa.Column("step", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("time", _FLOAT, nullable=False),
        sa.Column("value", _FLOAT),
        sqlite_with_rowid=False,
    )
