"""Storing what a driver reports, or what its run folder says when the driver is silent.

Everything may be reported twice, and is stored once. A report of an attempt that another has
replaced changes nothing, and the answer says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from kfac_dist.coordination.jobs.lifecycle import ACTIVE, JobState, Trigger
from kfac_dist.service.job_records import (
    Order,
    Report,
    ReportAnswer,
    ReportedEvent,
    ReportedState,
    StepValues,
)
from kfac_dist.service.store import AttemptRow, EventRow, JobRow
from kfac_dist.service.store.history import append_steps, forget_after
from kfac_dist.service.store.job_rows import failure_row, find_attempt, move, text_of, touch

_ORDERS: dict[str, Order] = {JobState.PAUSING: "pause", JobState.CANCELLING: "cancel"}
_NEWS = {JobState.RUNNING: Trigger.RUN, JobState.DEGRADED: Trigger.DEGRADE}
# How an attempt ends; the controller decides what follows for its job.
ATTEMPT_ENDED = frozenset(
    {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.PAUSED}
)


def take_up(
    session: Session, row: JobRow, report: Report, now: float, *, heard: bool
) -> ReportAnswer:
    """Store a report of the job in `row`; `heard` says whether the driver itself sent it."""
    attempt = find_attempt(session, row)
    if attempt is None or attempt.number != report.attempt:
        return _answer(row, order="none", fenced=True)
    if heard:
        attempt.heard_at = now
    before = _known(row, attempt)
    restarted = _add_events(session, row, attempt, report.events)
    if not restarted:  # after a restart the reader sends the steps again, from the first
        _add_steps(session, row, report.steps)
    if report.state is not None and attempt.ended_at is None:
        _apply_state(session, row, attempt, report.state, now)
    if _known(row, attempt) != before:
        touch(row, now)
    return _answer(row, order=_ORDERS.get(row.state, "none"), fenced=False)


def _known(row: JobRow, attempt: AttemptRow) -> tuple[object, ...]:
    return row.events_known, row.steps_known, attempt.state, attempt.reason, attempt.message


def _answer(row: JobRow, *, order: Order, fenced: bool) -> ReportAnswer:
    workers = row.spec["workers"]
    return ReportAnswer(
        order=order,
        events_known=row.events_known,
        steps_known=row.steps_known,
        fenced=fenced,
        gradient_workers=workers["gradient"],
        inverse_workers=workers["inverse"],
    )


def _add_events(
    session: Session, row: JobRow, attempt: AttemptRow, events: Sequence[ReportedEvent]
) -> bool:
    """Add new events, and return whether one says that the attempt repeats steps."""
    restarted = False
    for reported in events:
        if reported.line <= row.events_known:
            continue
        event = reported.event
        row.events_known = reported.line
        row.last_sequence += 1
        session.add(
            EventRow(
                job=row.number,
                sequence=row.last_sequence,
                kind=event.kind,
                message=text_of(event.message),
                step=event.step,
                time=event.time,
                severity=event.severity,
                role=event.role,
                rank=event.rank,
                attempt=event.attempt,
                details=event.plain_details(),
            )
        )
        if event.kind == "resumed" and event.attempt == attempt.number:
            _go_back(session, row, attempt, int(event.details["from_step"]))
            restarted = True
    return restarted


def _go_back(session: Session, row: JobRow, attempt: AttemptRow, step: int) -> None:
    attempt.resumed_from_step = step
    if step < row.steps_known:
        forget_after(session, row, step)
        row.steps_known = step


def _add_steps(session: Session, row: JobRow, steps: Sequence[StepValues]) -> None:
    new = [step for step in steps if step.step > row.steps_known]
    if new:
        append_steps(session, row, new)
        row.steps_known = max(step.step for step in new)


def _apply_state(
    session: Session, row: JobRow, attempt: AttemptRow, reported: ReportedState, now: float
) -> None:
    attempt.state, attempt.reason = reported.state, reported.reason
    attempt.message = text_of(reported.message)
    if reported.state in _NEWS and row.state in ACTIVE:
        if row.started_at is None:
            row.started_at = now
        # A job that is to pause or to be cancelled keeps the reason of that order.
        ordered = row.state in _ORDERS
        reason = row.reason if ordered else reported.reason
        message = row.message if ordered else reported.message
        move(session, row, _NEWS[reported.state], now, reason=reason, message=message)
    if reported.state in ATTEMPT_ENDED:
        attempt.ended_at = now
        row.first_failure = failure_row(reported.first_failure)
        row.summary = dict(reported.summary) if reported.summary is not None else row.summary
