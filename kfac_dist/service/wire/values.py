"""Turns values of messages into Python values, and back: times, states, failures, JSON objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import FirstFailure, UsageError
from kfac_dist.v1 import job_pb2

_NANOSECONDS = 1_000_000_000

M = TypeVar("M", bound=Message)


def message_of(kind: type[M], **fields: Any) -> M:
    """Return a message with these fields.

    Raises:
        UsageError: a value does not fit its field; names the field.
    """
    try:
        return kind(**fields)
    except ValueError:
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except ValueError as error:
                shown = value if isinstance(value, int) else repr(value)[:200]
                raise UsageError(f"{name}: {shown} cannot be sent: {error}") from None
        raise


def to_timestamp(seconds: float) -> Timestamp:
    """Return Unix seconds as a timestamp, rounded to microseconds."""
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp


def from_timestamp(stamp: Timestamp) -> float:
    """Return a timestamp in Unix seconds."""
    return stamp.seconds + stamp.nanos / _NANOSECONDS


def to_state(state: JobState) -> job_pb2.JobState.ValueType:
    """Return the number of a state."""
    return job_pb2.JobState.Value(f"JOB_STATE_{state}")


def from_state(state: job_pb2.JobState.ValueType) -> JobState:
    """Return the state with a number.

    Raises:
        ValueError: this version does not know the number.
    """
    name = job_pb2.JobState.Name(state).removeprefix("JOB_STATE_")
    return JobState(name)


def to_severity(severity: str) -> job_pb2.Severity.ValueType:
    """Return the number of a severity."""
    return job_pb2.Severity.Value(f"SEVERITY_{severity.upper()}")


def from_severity(severity: job_pb2.Severity.ValueType) -> str:
    """Return the severity with a number; an unspecified one is `info`."""
    name = job_pb2.Severity.Name(severity).removeprefix("SEVERITY_")
    return "info" if name == "UNSPECIFIED" else name.lower()


def from_failure(message: Any) -> FirstFailure | None:
    """Return the field `first_failure` of a message, None when it is absent."""
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
        ValueError: the text is not a JSON object.
    """
    if not text:
        return None
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, not {type(value).__name__}")
    return value


def to_failure(failure: FirstFailure | None) -> job_pb2.FirstFailure | None:
    """Return a failure as a message, None for None."""
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
    """Return the timestamp in a field as Unix seconds, None when it is absent."""
    return from_timestamp(getattr(message, field)) if message.HasField(field) else None
