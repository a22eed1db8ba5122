"""What a message may say, as far as `Jobs` does not check it: what is a matter of the wire."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import UsageError
from kfac_dist.service.job_records import is_job_id
from kfac_dist.service.wire.status import FieldError
from kfac_dist.service.wire.transport import MAX_SPEC_BYTES
from kfac_dist.service.wire.values import from_state
from kfac_dist.v1 import job_pb2

_MAX_NAMES = 50
_MAX_LIST = 1000


def job_id(value: str) -> str:
    """Return a job's id."""
    if not is_job_id(value):
        raise FieldError("job_id", f"{_shown(value)} is no job's id (letters, digits, . _ -)")
    return value


def spec(text: str) -> Mapping[str, Any]:
    """Return a specification as it was sent, not yet checked for what it says."""
    size = len(text.encode())
    if size > MAX_SPEC_BYTES:
        raise FieldError("spec_json", f"{size:,} bytes; at most {MAX_SPEC_BYTES:,}")
    try:
        values = json.loads(text, parse_constant=_no_constant)
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise FieldError("spec_json", f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise FieldError("spec_json", f"not a JSON object but {type(values).__name__}")
    return values


def in_range(field: str, value: int, low: int, high: int, *, default: int | None = None) -> int:
    """Return a number, or for 0 the default, and refuse what is outside the closed interval."""
    if value == 0 and default is not None:
        return default
    if not low <= value <= high:
        raise FieldError(field, f"{value} is not between {low} and {high}")
    return value


def states(values: Sequence[job_pb2.JobState.ValueType]) -> list[JobState]:
    """Return states to filter by."""
    try:
        return [from_state(value) for value in values]
    except ValueError:
        raise FieldError("states", f"{list(values)[:10]}: unknown states") from None


def names(field: str, values: Sequence[str]) -> list[str]:
    """Return names of metrics."""
    if len(values) > _MAX_NAMES:
        raise FieldError(field, f"{len(values)} names; at most {_MAX_NAMES}")
    return list(dict.fromkeys(values))


def at_most(field: str, values: Sequence[Any]) -> Sequence[Any]:
    """Return a list, and refuse a very long one."""
    if len(values) > _MAX_LIST:
        raise FieldError(field, f"{len(values)} values; at most {_MAX_LIST}")
    return values


def no_both(first: str, second: str) -> UsageError:
    """Return the error of two fields that exclude each other."""
    return FieldError(first, f"not together with {second}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _shown(value: str) -> str:
    return repr(value if len(value) <= 60 else value[:60] + "...")
