"""Turns the records of the control plane into protobuf messages, and back."""

from __future__ import annotations

import json

from kfac_dist.service.job_records import (
    Attempt,
    CheckpointFacts,
    Job,
    JobEvent,
    LogLine,
    MetricPoint,
    MetricSeries,
)
from kfac_dist.service.wire.values import (
    from_failure,
    from_json,
    from_severity,
    from_state,
    from_time,
    from_timestamp,
    optional,
    to_failure,
    to_severity,
    to_state,
    to_time,
    to_timestamp,
)
from kfac_dist.v1 import job_pb2


def to_job(job: Job, *, whole: bool = True) -> job_pb2.Job:
    """Return a job as a message; without `whole`, no specification and no summary."""
    return job_pb2.Job(
        id=job.id,
        name=job.name,
        owner=job.owner,
        state=to_state(job.state),
        reason=job.reason or "",
        message=job.message or "",
        first_failure=to_failure(job.first_failure),
        attempt=job.attempt,
        num_restarts=job.num_restarts,
        priority=job.priority,
        spec_json=json.dumps(job.spec) if whole else "",
        step=job.step,
        num_steps=job.num_steps,
        created_at=to_timestamp(job.created_at),
        updated_at=to_timestamp(job.updated_at),
        started_at=to_time(job.started_at),
        ended_at=to_time(job.ended_at),
        run_dir=job.run_dir,
        data_dir=job.data_dir or "",
        package_sha256=job.package or "",
        summary_json=json.dumps(job.summary) if whole and job.summary is not None else "",
        revision=job.revision,
    )


def from_job(message: job_pb2.Job) -> Job:
    """Return the job in a message; the specification of a listed job is empty."""
    return Job(
        id=message.id,
        name=message.name,
        owner=message.owner,
        state=from_state(message.state),
        reason=message.reason or None,
        message=message.message or None,
        first_failure=from_failure(message),
        attempt=message.attempt,
        num_restarts=message.num_restarts,
        priority=message.priority,
        spec=from_json(message.spec_json) or {},
        step=message.step,
        num_steps=message.num_steps,
        created_at=from_timestamp(message.created_at),
        updated_at=from_timestamp(message.updated_at),
        started_at=from_time(message, "started_at"),
        ended_at=from_time(message, "ended_at"),
        run_dir=message.run_dir,
        data_dir=message.data_dir or None,
        package=message.package_sha256 or None,
        summary=from_json(message.summary_json),
        revision=message.revision,
        idempotency_key=None,  # never sent back: only the caller who chose it needs it
    )


def to_attempt(attempt: Attempt) -> job_pb2.Attempt:
    """Return an attempt as a message."""
    return job_pb2.Attempt(
        job_id=attempt.job,
        number=attempt.number,
        state=to_state(attempt.state),
        reason=attempt.reason or "",
        message=attempt.message or "",
        started_at=to_timestamp(attempt.started_at),
        ended_at=to_time(attempt.ended_at),
        heard_at=to_time(attempt.heard_at),
        resumed_from_step=attempt.resumed_from_step,
    )


def from_attempt(message: job_pb2.Attempt) -> Attempt:
    """Return the attempt in a message."""
    return Attempt(
        job=message.job_id,
        number=message.number,
        state=from_state(message.state),
        reason=message.reason or None,
        message=message.message or None,
        started_at=from_timestamp(message.started_at),
        ended_at=from_time(message, "ended_at"),
        heard_at=from_time(message, "heard_at"),
        resumed_from_step=optional(message, "resumed_from_step"),
    )


def to_event(event: JobEvent) -> job_pb2.JobEvent:
    """Return an event as a message."""
    return job_pb2.JobEvent(
        job_id=event.job,
        sequence=event.sequence,
        kind=event.kind,
        message=event.message,
        step=event.step,
        time=to_timestamp(event.time),
        severity=to_severity(event.severity),
        role=event.role or "",
        rank=event.rank,
        attempt=event.attempt,
        details_json=json.dumps(event.details) if event.details else "",
    )


def from_event(message: job_pb2.JobEvent) -> JobEvent:
    """Return the event in a message."""
    return JobEvent(
        job=message.job_id,
        sequence=message.sequence,
        kind=message.kind,
        message=message.message,
        step=message.step,
        time=from_timestamp(message.time),
        severity=from_severity(message.severity),
        role=message.role or None,
        rank=optional(message, "rank"),
        attempt=message.attempt,
        details=from_json(message.details_json) or {},
    )


def to_series(series: MetricSeries) -> job_pb2.MetricSeries:
    """Return a history as a message."""
    return job_pb2.MetricSeries(
        name=series.name,
        sampled_every=series.sampled_every,
        points=[
            job_pb2.MetricPoint(step=point.step, time=to_timestamp(point.time), value=point.value)
            for point in series.points
        ],
    )


def from_series(message: job_pb2.MetricSeries) -> MetricSeries:
    """Return the history in a message."""
    return MetricSeries(
        name=message.name,
        sampled_every=message.sampled_every,
        points=[
            MetricPoint(step=point.step, time=from_timestamp(point.time), value=point.value)
            for point in message.points
        ],
    )


def to_checkpoint(checkpoint: CheckpointFacts) -> job_pb2.Checkpoint:
    """Return a checkpoint as a message."""
    return job_pb2.Checkpoint(
        step=checkpoint.step,
        path=checkpoint.path,
        size_bytes=checkpoint.size_bytes,
        created_at=to_timestamp(checkpoint.created_at),
    )


def from_checkpoint(message: job_pb2.Checkpoint) -> CheckpointFacts:
    """Return the checkpoint in a message."""
    return CheckpointFacts(
        step=message.step,
        path=message.path,
        size_bytes=message.size_bytes,
        created_at=from_timestamp(message.created_at),
    )


def to_log_line(line: LogLine) -> job_pb2.LogLine:
    """Return a line of a log as a message."""
    return job_pb2.LogLine(
        role=line.role,
        rank=line.rank,
        attempt=line.attempt,
        text=line.text,
        time=to_time(line.time),
    )


def from_log_line(message: job_pb2.LogLine) -> LogLine:
    """Return the log line in a message."""
    return LogLine(
        role=message.role,
        rank=message.rank,
        attempt=message.attempt,
        text=message.text,
        time=from_time(message, "time"),
    )
