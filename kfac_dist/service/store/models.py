"""The tables. Times are in Unix seconds; a metric's value that was not finite is NULL.

`migrations/` creates these tables; a test checks that the two agree.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite autoincrements only an INTEGER column; PostgreSQL's INTEGER has just 32 bits.
_Number = BigInteger().with_variant(Integer(), "sqlite")


class Base(DeclarativeBase):
    """The base of all tables; maps `str` to text and `float` to 64 bits unless a column differs."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: Text(),
        float: Float(53),
        int: BigInteger(),
        dict[str, Any]: JSON(none_as_null=True),
    }


class JobRow(Base):
    """A job; see `job_records.Job`.

    `request_sha256` hashes what the user requested. `state_since` is when the job entered its
    state, `cancel_now` whether to end it by force. `last_sequence` belongs to the newest event.
    `events_known` and `steps_known` say how much of the run folder's journals is stored: the last
    line of its events and the last step.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("owner", "idempotency_key", name="jobs_idempotency"),
        Index("jobs_by_state", "state", "number"),
        Index("jobs_by_owner", "owner", "number"),
        Index("jobs_by_name", "name", "number"),
    )

    number: Mapped[int] = mapped_column(_Number, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(120), unique=True)
    name: Mapped[str] = mapped_column(String(100))
    owner: Mapped[str] = mapped_column(String(200))
    idempotency_key: Mapped[str | None] = mapped_column(String(200))
    request_sha256: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(20))
    state_since: Mapped[float]
    reason: Mapped[str | None]
    message: Mapped[str | None]
    first_failure: Mapped[dict[str, Any] | None]
    attempt: Mapped[int] = mapped_column(default=0)
    num_restarts: Mapped[int] = mapped_column(default=0)
    cancel_now: Mapped[bool] = mapped_column(default=False)
    priority: Mapped[int]
    spec: Mapped[dict[str, Any]]
    num_steps: Mapped[int]
    created_at: Mapped[float]
    updated_at: Mapped[float]
    started_at: Mapped[float | None]
    ended_at: Mapped[float | None]
    run_dir: Mapped[str]
    data_dir: Mapped[str | None]
    package: Mapped[str | None] = mapped_column(String(64))
    summary: Mapped[dict[str, Any] | None]
    revision: Mapped[int] = mapped_column(default=1)
    last_sequence: Mapped[int] = mapped_column(default=0)
    events_known: Mapped[int] = mapped_column(default=0)
    steps_known: Mapped[int] = mapped_column(default=0)


class AttemptRow(Base):
    """An attempt of a job; see `job_records.Attempt`. `token_sha256` hashes its driver's secret."""

    __tablename__ = "attempts"

    job: Mapped[int] = mapped_column(_Number, ForeignKey("jobs.number"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(String(20))
    reason: Mapped[str | None]
    message: Mapped[str | None]
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    heard_at: Mapped[float | None]
    resumed_from_step: Mapped[int | None]
    token_sha256: Mapped[str] = mapped_column(String(64))


class EventRow(Base):
    """An event of a job; see `job_records.JobEvent`."""

    __tablename__ = "events"

    job: Mapped[int] = mapped_column(_Number, ForeignKey("jobs.number"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str]
    message: Mapped[str]
    step: Mapped[int]
    time: Mapped[float]
    severity: Mapped[str] = mapped_column(String(20))
    role: Mapped[str | None]
    rank: Mapped[int | None]
    attempt: Mapped[int]
    details: Mapped[dict[str, Any]]


class SeriesRow(Base):
    """A metric that has a history in a job."""

    __tablename__ = "metric_series"
    __table_args__ = (UniqueConstraint("job", "name", name="metric_series_of_job"),)

    id: Mapped[int] = mapped_column(_Number, primary_key=True, autoincrement=True)
    job: Mapped[int] = mapped_column(_Number, ForeignKey("jobs.number"))
    name: Mapped[str]


class PointRow(Base):
    """A metric's value at a step."""

    __tablename__ = "metric_points"
    __table_args__ = {"sqlite_with_rowid": False}  # noqa: RUF012 - SQLAlchemy's own form

    series: Mapped[int] = mapped_column(_Number, ForeignKey("metric_series.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    time: Mapped[float]
    value: Mapped[float | None]


class TokenRow(Base):
    """A bearer token, of which only the hash is stored."""

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    role: Mapped[str] = mapped_column(String(20))
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    last_used_at: Mapped[float | None]
