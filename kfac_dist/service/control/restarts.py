"""Automatic restarts: how earlier attempts ended, and until when a job rests before the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.coordination.jobs.supervision import PREEMPTED_REASON, EarlierEnd, WaitLimits
from kfac_dist.service.store import AttemptRow, EventRow, JobRow

ATTEMPT_ENDED_EVENT = "attempt_ended"
"""The event of the control plane at the end of an attempt; its step is the last that was known."""


@dataclass(frozen=True, kw_only=True)
class Rest:
    """A queued job rests after a failure, and may not start before `until`, in Unix seconds."""

    until: float
    message: str


def earlier_ends(session: Session, row: JobRow) -> Sequence[EarlierEnd]:
    """Return how the attempts ended that automatic restarts have replaced, newest first."""
    first = row.attempt - row.num_restarts
    ended = EventRow.kind == ATTEMPT_ENDED_EVENT
    ends = session.execute(
        select(EventRow.attempt, EventRow.step).where(EventRow.job == row.number, ended)
    )
    steps = {number: step for number, step in ends}  # noqa: C416 - rows are not typed as pairs
    attempts = session.execute(
        select(AttemptRow.number, AttemptRow.reason)
        .where(
            AttemptRow.job == row.number,
            AttemptRow.number >= first,
            AttemptRow.number < row.attempt,
        )
        .order_by(AttemptRow.number.desc())
    )
    return [EarlierEnd(reason=reason, step=steps.get(number, 0)) for number, reason in attempts]


def num_preemptions(session: Session, row: JobRow) -> int:
    """Return how many attempts of a job ended because a worker was preempted."""
    preempted = AttemptRow.reason == PREEMPTED_REASON
    query = select(func.count()).where(AttemptRow.job == row.number, preempted)
    return int(session.execute(query).scalar_one())


def resting(session: Session, limits: WaitLimits, now: float) -> Mapping[str, Rest]:
    """Return the queued jobs that rest after a failure, by their ids."""
    found = session.execute(
        select(
            JobRow.id,
            JobRow.num_restarts,
            AttemptRow.number,
            AttemptRow.ended_at,
            AttemptRow.reason,
            AttemptRow.message,
        )
        .join(AttemptRow, (AttemptRow.job == JobRow.number) & (AttemptRow.number == JobRow.attempt))
        .where(JobRow.state == JobState.QUEUED, JobRow.num_restarts > 0)
    )
    rests = {}
    for job_id, num_restarts, number, ended_at, reason, message in found:
        seconds = limits.rest_seconds(num_restarts)
        if ended_at is not None and ended_at + seconds > now:
            until = ended_at + seconds
            why = message or reason or "no message"
            text = f"attempt {number + 1} starts at {_utc(until)}, {seconds:g} s after: {why}"
            rests[job_id] = Rest(until=until, message=text)
    return rests


def _utc(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
