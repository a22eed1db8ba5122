"""Reports and their answers as protobuf messages, and back: a driver sends what a server reads."""

from __future__ import annotations

import json

from pydantic import ValidationError

from kfac_dist.runs import Event
from kfac_dist.service.job_records import (
    Order,
    Report,
    ReportAnswer,
    ReportedEvent,
    ReportedState,
    StepValues,
)
from kfac_dist.service.wire.status import FieldError
from kfac_dist.service.wire.values import (
    from_failure,
    from_json,
    from_severity,
    from_state,
    from_timestamp,
    optional,
    to_failure,
    to_severity,
    to_state,
    to_timestamp,
)
from kfac_dist.v1 import report_service_pb2 as pb

_ORDERS: dict[int, Order] = {pb.ORDER_PAUSE: "pause", pb.ORDER_CANCEL: "cancel"}


def to_request(report: Report) -> pb.ReportRequest:
    """Return a report as a message."""
    return pb.ReportRequest(
        job_id=report.job,
        attempt=report.attempt,
        state=None if report.state is None else _to_state(report.state),
        events=[_to_event(event) for event in report.events],
        steps=[_to_step(step) for step in report.steps],
    )


def from_request(message: pb.ReportRequest) -> Report:
    """Return the report in a message.

    Raises:
        FieldError: a field is wrong.
    """
    return Report(
        job=message.job_id,
        attempt=message.attempt,
        state=_from_state(message.state) if message.HasField("state") else None,
        events=[_from_event(event) for event in message.events],
        steps=[_from_step(step) for step in message.steps],
    )


def to_response(answer: ReportAnswer) -> pb.ReportResponse:
    """Return an answer as a message."""
    return pb.ReportResponse(
        order=pb.Order.Value(f"ORDER_{answer.order.upper()}"),
        events_known=answer.events_known,
        steps_known=answer.steps_known,
        fenced=answer.fenced,
        gradient_workers=answer.gradient_workers or 0,
        inverse_workers=answer.inverse_workers or 0,
    )


def from_response(message: pb.ReportResponse) -> ReportAnswer:
    """Return the answer in a message; an order that this version does not know is ignored."""
    return ReportAnswer(
        order=_ORDERS.get(message.order, "none"),
        events_known=message.events_known,
        steps_known=message.steps_known,
        fenced=message.fenced,
        gradient_workers=message.gradient_workers or None,
        inverse_workers=message.inverse_workers or None,
    )


def _to_state(state: ReportedState) -> pb.ReportedState:
    return pb.ReportedState(
        state=to_state(state.state),
        step=state.step,
        reason=state.reason or "",
        message=state.message or "",
        first_failure=to_failure(state.first_failure),
        resumed_from_step=state.resumed_from_step,
        summary_json="" if state.summary is None else json.dumps(state.summary),
    )


def _from_state(message: pb.ReportedState) -> ReportedState:
    try:
        return ReportedState(
            state=from_state(message.state),
            step=message.step,
            reason=message.reason or None,
            message=message.message or None,
            first_failure=from_failure(message),
            resumed_from_step=optional(message, "resumed_from_step"),
            summary=from_json(message.summary_json),
        )
    except (ValueError, RecursionError) as error:
        raise FieldError("state", str(error)) from None


def _to_event(reported: ReportedEvent) -> pb.ReportedEvent:
    event = reported.event
    return pb.ReportedEvent(
        line=reported.line,
        kind=event.kind,
        message=event.message,
        step=event.step,
        time=to_timestamp(event.time),
        severity=to_severity(event.severity),
        role=event.role or "",
        rank=event.rank,
        details_json=json.dumps(event.plain_details()),
        attempt=event.attempt,
    )


def _from_event(message: pb.ReportedEvent) -> ReportedEvent:
    try:
        event = Event.model_validate(
            {
                "kind": message.kind,
                "message": message.message,
                "step": message.step,
                "time": from_timestamp(message.time),
                "severity": from_severity(message.severity),
                "role": message.role or None,
                "rank": optional(message, "rank"),
                "attempt": message.attempt,
                "details": from_json(message.details_json) or {},
            }
        )
    except (ValidationError, ValueError, RecursionError) as error:
        raise FieldError("events", str(error)) from None
    return ReportedEvent(line=message.line, event=event)


def _to_step(step: StepValues) -> pb.ReportedStep:
    return pb.ReportedStep(step=step.step, time=to_timestamp(step.time), values=dict(step.values))


def _from_step(message: pb.ReportedStep) -> StepValues:
    return StepValues(
        step=message.step, time=from_timestamp(message.time), values=dict(message.values)
    )
