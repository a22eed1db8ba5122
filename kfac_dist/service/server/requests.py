"""Checks of request fields that belong to the wire format; `Jobs` checks what they mean."""

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
    """Return a job's id.

    Raises:
        FieldError: no job can have this id.
    """
    if not is_job_id(value):
        raise FieldError(
            "job_id", f"{_shortened(value)} is not a job's id (letters, digits, . _ -)"
        )
    return value


def spec(text: str) -> Mapping[str, Any]:
    """Return a specification as it was sent; its keys and values are not checked here.

    Raises:
        FieldError: the text is too long or not a JSON object.
    """
    size = len(text.encode())
    if size > MAX_SPEC_BYTES:
        raise FieldError("spec_json", f"{size:,} bytes; at most {MAX_SPEC_BYTES:,}")
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(values, ensure_ascii=False).encode()  # refuses half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise FieldError("spec_json", f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise FieldError("spec_json", f"must be a JSON object, not {type(values).__name__}")
    return values


def in_range(field: str, value: int, low: int, high: int, *, default: int | None = None) -> int:
    """Return a number, or the default for 0.

    Raises:
        FieldError: the number is outside the closed interval [low, high].
    """
    if value == 0 and default is not None:
        return default
    if not low <= value <= high:
        raise FieldError(field, f"{value} is not between {low} and {high}")
    return value


def states(values: Sequence[job_pb2.JobState.ValueType]) -> list[JobState]:
    """Return the states to filter by.

    Raises:
        FieldError: this version does not know one of the numbers.
    """
    try:
        return [from_state(value) for value in values]
    except ValueError:
        raise FieldError("states", f"{list(values)[:10]}: unknown states") from None


def names(field: str, values: Sequence[str]) -> list[str]:
    """Return the names of metrics without duplicates.

    Raises:
        FieldError: there are too many names.
    """
    if len(values) > _MAX_NAMES:
        raise FieldError(field, f"{len(values)} names; at most {_MAX_NAMES}")
    return list(dict.fromkeys(values))


def at_most(field: str, values: Sequence[Any]) -> Sequence[Any]:
    """Return a list that is not too long.

    Raises:
        FieldError: the list is too long.
    """
    if len(values) > _MAX_LIST:
        raise FieldError(field, f"{len(values)} values; at most {_MAX_LIST}")
    return values


def excludes(first: str, second: str) -> UsageError:
    """Return the error for two fields that exclude each other."""
    return FieldError(first, f"cannot be used together with {second}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _shortened(value: str) -> str:
    return repr(value if len(value) <= 60 else value[:60] + "...")
