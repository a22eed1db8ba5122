"""What a driver tells, or its run folder in its stead, taken up into the store.

Everything may be told twice: a line of the events and a step are taken once, and an attempt that
another has replaced is told so and changes nothing.
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
# How an attempt ends; the controller draws the conclusion for its job.
ATTEMPT_ENDED = frozenset(
    {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.PAUSED}
)


def take_up(
    session: Session, row: JobRow, report: Report, now: float, *, heard: bool
) -> ReportAnswer:
    """Take up a report of the job in `row`; `heard` is whether the driver itself told it."""
    attempt = find_attempt(session, row)
    if attempt is None or attempt.number != report.attempt:
        return _answer(row, order="none", fenced=True)
    if heard:
        attempt.heard_at = now
    before = _known(row, attempt)
    restarted = _take_events(session, row, attempt, report.events)
    if not restarted:  # else they may lack the steps that are done again
        _take_steps(session, row, report.steps)
    if report.state is not None and attempt.ended_at is None:
        _take_state(session, row, attempt, report.state, now)
    if _known(row, attempt) != before:
        touch(row, now)
    return _answer(row, order=_ORDERS.get(row.state, "none"), fenced=False)


def _known(row: JobRow, attempt: AttemptRow) -> tuple[object, ...]:
    return row.events_known, row.steps_known, attempt.state, attempt.reason, attempt.message


def _answer(row: JobRow, *, order: Order, fenced: bool) -> ReportAnswer:
    return ReportAnswer(
        order=order, events_known=row.events_known, steps_known=row.steps_known, fenced=fenced
    )


def _take_events(
    session: Session, row: JobRow, attempt: AttemptRow, events: Sequence[ReportedEvent]
) -> bool:
    """Add new events and return whether one said that the attempt does steps again."""
    restarted = False
    for told in events:
        if told.line <= row.events_known:
            continue
        event = told.event
        row.events_known = told.line
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


def _take_steps(session: Session, row: JobRow, steps: Sequence[StepValues]) -> None:
    new = [step for step in steps if step.step > row.steps_known]
    if new:
        append_steps(session, row, new)
        row.steps_known = max(step.step for step in new)


def _take_state(
    session: Session, row: JobRow, attempt: AttemptRow, told: ReportedState, now: float
) -> None:
    attempt.state, attempt.reason = told.state, told.reason
    attempt.message = text_of(told.message)
    if told.state in _NEWS and row.state in ACTIVE:
        if row.started_at is None:
            row.started_at = now
        orders = row.state in _ORDERS
        reason, message = (row.reason, row.message) if orders else (told.reason, told.message)
        move(session, row, _NEWS[told.state], now, reason=reason, message=message)
    if told.state in ATTEMPT_ENDED:
        attempt.ended_at = now
        row.first_failure = failure_row(told.first_failure)
        row.summary = dict(told.summary) if told.summary is not None else row.summary
