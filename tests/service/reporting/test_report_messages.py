"""A report and its answer are the same after their way over the wire."""

from __future__ import annotations

import pytest

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import FirstFailure
from kfac_dist.runs import Event
from kfac_dist.service.job_records import (
    Order,
    Report,
    ReportAnswer,
    ReportedEvent,
    ReportedState,
    StepValues,
)
from kfac_dist.service.reporting.report_messages import (
    from_request,
    from_response,
    to_request,
    to_response,
)
from kfac_dist.service.wire.status import FieldError
from kfac_dist.v1 import report_service_pb2 as pb


def test_a_report_with_all_its_parts() -> None:
    report = Report(
        job="digits-1",
        attempt=2,
        state=ReportedState(
            state=JobState.FAILED,
            step=7,
            reason="worker_died",
            message="inverse worker 0 died",
            first_failure=FirstFailure(
                role="inverse_worker", rank=0, time_seconds=5.5, log_tail="Killed"
            ),
            resumed_from_step=4,
            summary={"state": "FAILED"},
        ),
        events=[
            ReportedEvent(
                line=3,
                event=Event(
                    kind="worker_died",
                    message="Inverse worker 0 died.",
                    step=7,
                    time=5.5,
                    severity="error",
                    role="inverse_worker",
                    rank=0,
                    attempt=2,
                    details={"exit_code": -9},
                ),
            )
        ],
        steps=[StepValues(step=7, time=5.0, values={"loss": 0.5})],
    )
    sent = pb.ReportRequest.FromString(to_request(report).SerializeToString())
    assert from_request(sent) == report


def test_a_heartbeat_stays_empty() -> None:
    sent = from_request(to_request(Report(job="digits-1", attempt=1)))
    assert sent.is_empty
    assert (sent.job, sent.attempt) == ("digits-1", 1)


@pytest.mark.parametrize("order", ["none", "pause", "cancel"])
def test_answers(order: Order) -> None:
    answer = ReportAnswer(
        order=order, events_known=3, steps_known=9, fenced=True, inverse_workers=4
    )
    assert from_response(to_response(answer)) == answer


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.ReportRequest(state=pb.ReportedState(state=99)), "state"),
        (pb.ReportRequest(state=pb.ReportedState(state=1, summary_json="[1]")), "state"),
        (pb.ReportRequest(events=[pb.ReportedEvent(details_json="{")]), "events"),
    ],
)
def test_a_wrong_field_is_named(message: pb.ReportRequest, field: str) -> None:
    with pytest.raises(FieldError) as caught:
        from_request(message)
    assert caught.value.field == field
