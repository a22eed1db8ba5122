"""Reports as protobuf messages, on the driver's side; `server.report_calls` is the other side."""

from __future__ import annotations

import json

from kfac_dist.service.job_records import (
    Order,
    Report,
    ReportAnswer,
    ReportedEvent,
    ReportedState,
    StepValues,
)
from kfac_dist.service.wire.values import to_failure, to_severity, to_state, to_timestamp
from kfac_dist.v1 import report_service_pb2 as pb

_ORDERS: dict[int, Order] = {pb.ORDER_PAUSE: "pause", pb.ORDER_CANCEL: "cancel"}


def to_request(report: Report) -> pb.ReportRequest:
    """Return a report as a message."""
    return pb.ReportRequest(
        job_id=report.job,
        attempt=report.attempt,
        state=None if report.state is None else _state(report.state),
        events=[_event(event) for event in report.events],
        steps=[_step(step) for step in report.steps],
    )


def from_response(message: pb.ReportResponse) -> ReportAnswer:
    """Return the answer in a message; an order unknown to this version counts as `none`."""
    return ReportAnswer(
        order=_ORDERS.get(message.order, "none"),
        events_known=message.events_known,
        steps_known=message.steps_known,
        fenced=message.fenced,
    )


def _state(state: ReportedState) -> pb.ReportedState:
    return pb.ReportedState(
        state=to_state(state.state),
        step=state.step,
        reason=state.reason or "",
        message=state.message or "",
        first_failure=to_failure(state.first_failure),
        resumed_from_step=state.resumed_from_step,
        summary_json="" if state.summary is None else json.dumps(state.summary),
    )


def _event(reported: ReportedEvent) -> pb.ReportedEvent:
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


def _step(step: StepValues) -> pb.ReportedStep:
    return pb.ReportedStep(step=step.step, time=to_timestamp(step.time), values=dict(step.values))
