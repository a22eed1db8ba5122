"""ReportService: what drivers tell."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from kfac_dist.errors import NotAuthenticatedError, NotFoundError
from kfac_dist.runs import Event
from kfac_dist.service.job_records import Report, ReportedEvent, ReportedState, StepValues
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.server import requests
from kfac_dist.service.server.calls import Stream, Unary
from kfac_dist.service.wire.status import FieldError
from kfac_dist.service.wire.values import (
    from_failure,
    from_json,
    from_severity,
    from_state,
    from_timestamp,
    optional,
)
from kfac_dist.v1 import report_service_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["ReportService"].full_name


@dataclass(frozen=True, kw_only=True)
class ReportCalls:
    """The one call of drivers. It has a token of its own, which is good for one attempt."""

    jobs: Jobs

    def report(self, request: pb.ReportRequest, token: str) -> pb.ReportResponse:
        """Take a driver's news up."""
        job_id = requests.job_id(request.job_id)
        if not self._is_known(job_id, request.attempt, token):
            raise NotAuthenticatedError(
                f"this is not the report token of attempt {request.attempt} of job {job_id}"
            )
        answer = self.jobs.report(to_report(request))
        return pb.ReportResponse(
            order=pb.Order.Value(f"ORDER_{answer.order.upper()}"),
            events_known=answer.events_known,
            steps_known=answer.steps_known,
            fenced=answer.fenced,
        )

    def _is_known(self, job_id: str, attempt: int, token: str) -> bool:
        """Whether it is that attempt's token; a stranger is not told whether there is the job."""
        try:
            return self.jobs.check_report_token(job_id, attempt, token)
        except NotFoundError:
            return False


def report_methods(calls: ReportCalls) -> dict[str, Unary | Stream]:
    """Return the methods of ReportService."""
    return {"Report": Unary(request=pb.ReportRequest, role=None, function=calls.report)}


def to_report(request: pb.ReportRequest) -> Report:
    """Return the report in a message.

    Raises:
        FieldError: a field is wrong.
    """
    return Report(
        job=request.job_id,
        attempt=request.attempt,
        state=_state(request.state) if request.HasField("state") else None,
        events=[_event(event) for event in requests.at_most("events", request.events)],
        steps=[
            StepValues(step=step.step, time=from_timestamp(step.time), values=dict(step.values))
            for step in requests.at_most("steps", request.steps)
        ],
    )


def _state(message: pb.ReportedState) -> ReportedState:
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


def _event(message: pb.ReportedEvent) -> ReportedEvent:
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
