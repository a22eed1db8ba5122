"""Rows of jobs, attempts and events: found, changed by the rules of their life, and read.

Everything that changes a job goes through `move`, `note` or `touch`, in a transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from kfac_dist.coordination.jobs.lifecycle import ENDED, JobState, Trigger, next_state
from kfac_dist.errors import FirstFailure, NotFoundError
from kfac_dist.runs.records import Severity
from kfac_dist.service.job_records import Attempt, Job, JobEvent, is_job_id
from kfac_dist.service.store import AttemptRow, EventRow, JobRow


def find(session: Session, job_id: str, *, to_change: bool = False) -> JobRow:
    """Return the row of a job; `to_change` keeps others from it until the transaction ends.

    Raises:
        NotFoundError: there is none of this id.
    """
    query = select(JobRow).where(JobRow.id == job_id)
    row = None
    if is_job_id(job_id):  # anything else is no id, and may be no text to a database
        row = session.scalar(query.with_for_update() if to_change else query)
    if row is None:
        raise NotFoundError(f"job {job_id[:120]!r}: there is no such job")
    return row


def find_attempt(session: Session, row: JobRow) -> AttemptRow | None:
    """Return the newest attempt of a job, None before the first."""
    return session.get(AttemptRow, (row.number, row.attempt))


def move(
    session: Session,
    row: JobRow,
    event: Trigger,
    now: float,
    *,
    reason: str | None = None,
    message: str | None = None,
) -> bool:
    """Let `event` happen to a job and return whether its state is another one now.

    Raises:
        ConflictError: it cannot happen in this state.
    """
    before = JobState(row.state)
    after = next_state(before, event)
    if (after, reason, message) == (before, row.reason, row.message):
        return False
    row.state, row.reason, row.message = after, reason, text_of(message)
    if after is not before:
        row.state_since = now
        row.ended_at = now if after in ENDED else None
    touch(row, now)
    return after is not before


def touch(row: JobRow, now: float) -> None:
    """Make a change of `row` known to those who wait for one."""
    row.revision += 1
    row.updated_at = now


def note(
    session: Session,
    row: JobRow,
    kind: str,
    message: str,
    now: float,
    *,
    severity: Severity = "info",
    details: Mapping[str, Any] | None = None,
) -> None:
    """Add an event of the control plane's own."""
    row.last_sequence += 1
    session.add(
        EventRow(
            job=row.number,
            sequence=row.last_sequence,
            kind=kind,
            message=text_of(message) or "",
            step=row.steps_known,
            time=now,
            severity=severity,
            role="control_plane",
            rank=None,
            attempt=row.attempt,
            details=dict(details or {}),
        )
    )
    touch(row, now)


def text_of(value: str | None) -> str | None:
    """Make a text from a user's process fit for a database: PostgreSQL takes no NUL."""
    return None if value is None else value.replace("\x00", "\N{REPLACEMENT CHARACTER}")


def failure_row(failure: FirstFailure | None) -> dict[str, Any] | None:
    """Return what is stored of a failure."""
    return asdict(failure) if failure else None


def to_job(row: JobRow | Row[Any], *, whole: bool = True) -> Job:
    """Read a job; not `whole` leaves out specification and summary, which a listing's rows lack."""
    failure = row.first_failure
    return Job(
        id=row.id,
        name=row.name,
        owner=row.owner,
        state=JobState(row.state),
        reason=row.reason,
        message=row.message,
        first_failure=FirstFailure(**failure) if failure else None,
        attempt=row.attempt,
        num_restarts=row.num_restarts,
        priority=row.priority,
        spec=row.spec if whole else {},
        step=row.steps_known,
        num_steps=row.num_steps,
        created_at=row.created_at,
        updated_at=row.updated_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        run_dir=row.run_dir,
        data_dir=row.data_dir,
        package=row.package,
        summary=row.summary if whole else None,
        revision=row.revision,
        idempotency_key=row.idempotency_key,
    )


def to_attempt(row: AttemptRow, job_id: str) -> Attempt:
    """Read an attempt."""
    return Attempt(
        job=job_id,
        number=row.number,
        state=JobState(row.state),
        reason=row.reason,
        message=row.message,
        started_at=row.started_at,
        ended_at=row.ended_at,
        heard_at=row.heard_at,
        resumed_from_step=row.resumed_from_step,
    )


def to_event(row: EventRow, job_id: str) -> JobEvent:
    """Read an event."""
    return JobEvent(
        job=job_id,
        sequence=row.sequence,
        kind=row.kind,
        message=row.message,
        step=row.step,
        time=row.time,
        severity=row.severity,
        role=row.role,
        rank=row.rank,
        attempt=row.attempt,
        details=row.details,
    )
