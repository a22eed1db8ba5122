"""Values in messages: times, states, severities, failures, JSON objects, what may be absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import FirstFailure
from kfac_dist.v1 import job_pb2

_NANOSECONDS = 1_000_000_000


def to_timestamp(seconds: float) -> Timestamp:
    """Return Unix seconds as a timestamp, to the microsecond."""
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp


def from_timestamp(stamp: Timestamp) -> float:
    """Return a timestamp in Unix seconds."""
    return stamp.seconds + stamp.nanos / _NANOSECONDS


def to_state(state: JobState) -> job_pb2.JobState.ValueType:
    """Return a state's number."""
    return job_pb2.JobState.Value(f"JOB_STATE_{state}")


def from_state(state: job_pb2.JobState.ValueType) -> JobState:
    """Return the state of a number.

    Raises:
        ValueError: it is none that this version knows.
    """
    name = job_pb2.JobState.Name(state).removeprefix("JOB_STATE_")
    return JobState(name)


def to_severity(severity: str) -> job_pb2.Severity.ValueType:
    """Return a severity's number."""
    return job_pb2.Severity.Value(f"SEVERITY_{severity.upper()}")


def from_severity(severity: job_pb2.Severity.ValueType) -> str:
    """Return the severity of a number; what was not told is info."""
    name = job_pb2.Severity.Name(severity).removeprefix("SEVERITY_")
    return "info" if name == "UNSPECIFIED" else name.lower()


def from_failure(message: Any) -> FirstFailure | None:
    """Return the first failure of a message that may have one."""
    if not message.HasField("first_failure"):
        return None
    failure = message.first_failure
    return FirstFailure(
        role=failure.role,
        rank=failure.rank,
        time_seconds=from_timestamp(failure.time),
        log_tail=failure.log_tail,
    )


def optional(message: Any, field: str) -> Any:
    """Return a field, None when it is absent."""
    return getattr(message, field) if message.HasField(field) else None


def from_json(text: str) -> Mapping[str, Any] | None:
    """Return the object of a JSON field, None when it is empty.

    Raises:
        ValueError: it is no JSON object.
    """
    if not text:
        return None
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {type(value).__name__}")
    return value


def to_failure(failure: FirstFailure | None) -> job_pb2.FirstFailure | None:
    """Return a failure as a message."""
    if failure is None:
        return None
    return job_pb2.FirstFailure(
        role=failure.role,
        rank=failure.rank,
        time=to_timestamp(failure.time_seconds),
        log_tail=failure.log_tail,
    )


def to_time(seconds: float | None) -> Timestamp | None:
    """Return Unix seconds as a timestamp, None for None."""
    return None if seconds is None else to_timestamp(seconds)


def from_time(message: Any, field: str) -> float | None:
    """Return a timestamp of a message in Unix seconds, None when it is absent."""
    return from_timestamp(getattr(message, field)) if message.HasField(field) else None
