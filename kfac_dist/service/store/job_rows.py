"""Rows of jobs, attempts and events: find them, change them, turn them into records.

Every change of a job goes through `move`, `note` or `touch`, inside a transaction.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from kfac_dist.coordination.jobs.lifecycle import ENDED, JobState, Trigger, next_state
from kfac_dist.errors import FirstFailure, NotFoundError
from kfac_dist.runs.records import Severity
from kfac_dist.service.job_records import Attempt, Job, JobEvent, is_job_id
from kfac_dist.service.store import AttemptRow, EventRow, JobRow


def find(session: Session, job_id: str, *, for_update: bool = False) -> JobRow:
    """Return the row of a job; `for_update` locks it until the transaction ends.

    Raises:
        NotFoundError: no job has this id.
    """
    query = select(JobRow).where(JobRow.id == job_id)
    row = None
    if is_job_id(job_id):  # PostgreSQL would refuse some other texts, such as one with a NUL
        row = session.scalar(query.with_for_update() if for_update else query)
    if row is None:
        raise NotFoundError(f"job {job_id[:120]!r}: there is no such job")
    return row


def find_attempt(session: Session, row: JobRow) -> AttemptRow | None:
    """Return the newest attempt of a job, None before the first."""
    return session.get(AttemptRow, (row.number, row.attempt))


def move(
    session: Session,
    row: JobRow,
    trigger: Trigger,
    now: float,
    *,
    reason: str | None = None,
    message: str | None = None,
) -> bool:
    """Move a job to the state that follows from `trigger`, and return whether its state changed.

    Raises:
        ConflictError: the trigger is not permitted in the job's state.
    """
    before = JobState(row.state)
    after = next_state(before, trigger)
    if (after, reason, message) == (before, row.reason, row.message):
        return False
    row.state, row.reason, row.message = after, reason, text_of(message)
    if after is not before:
        row.state_since = now
        row.ended_at = now if after in ENDED else None
    touch(row, now)
    return after is not before


def touch(row: JobRow, now: float) -> None:
    """Mark the row as changed, so that listeners are called after the transaction."""
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
) -> None:
    """Add an event of the control plane to the job's events."""
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
            details={},
        )
    )
    touch(row, now)


def text_of(value: str | None) -> str | None:
    """Replace NUL characters in a text of a user's process: PostgreSQL refuses them."""
    return None if value is None else value.replace("\x00", "\N{REPLACEMENT CHARACTER}")


def failure_row(failure: FirstFailure | None) -> dict[str, Any] | None:
    """Return a failure as it is stored, a JSON object."""
    return asdict(failure) if failure else None


def to_job(row: JobRow | Row[Any], *, whole: bool = True) -> Job:
    """Return the job in a row; without `whole`, no specification and no summary.

    Rows of a listing do not have those two columns.
    """
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
    """Return the attempt in a row."""
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
    """Return the event in a row."""
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
