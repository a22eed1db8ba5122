"""Errors on the wire: one table of kfac_dist's errors and gRPC's codes, used in both directions.

An error travels as a google.rpc.Status. It has the code, the message that a user sees, and an
ErrorInfo whose reason is the name of the error's class. A FieldError adds a BadRequest that names
the field.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from kfac_dist.errors import (
    CancelledError,
    ConflictError,
    InvalidSpecError,
    JobFailedError,
    KfacDistError,
    LimitExceededError,
    NotAllowedError,
    NotAuthenticatedError,
    NotFoundError,
    TimedOutError,
    UnreachableError,
    UsageError,
)

DOMAIN = "kfac_dist"

CODES: dict[type[KfacDistError], grpc.StatusCode] = {
    UsageError: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidSpecError: grpc.StatusCode.INVALID_ARGUMENT,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    UnreachableError: grpc.StatusCode.UNAVAILABLE,
    NotAllowedError: grpc.StatusCode.PERMISSION_DENIED,
    NotAuthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    LimitExceededError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TimedOutError: grpc.StatusCode.DEADLINE_EXCEEDED,
    CancelledError: grpc.StatusCode.CANCELLED,
    ConflictError: grpc.StatusCode.FAILED_PRECONDITION,
    JobFailedError: grpc.StatusCode.FAILED_PRECONDITION,
}
"""The code of each error; a subclass without an entry has the code of its base."""

_CLASSES: dict[str, type[KfacDistError]] = {kind.__name__: kind for kind in CODES}

# For answers without an ErrorInfo, which come from gRPC itself or a proxy.
_CLASS_OF_CODE: dict[grpc.StatusCode, type[KfacDistError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: UsageError,
    grpc.StatusCode.OUT_OF_RANGE: UsageError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.UNAVAILABLE: UnreachableError,
    grpc.StatusCode.PERMISSION_DENIED: NotAllowedError,
    grpc.StatusCode.UNAUTHENTICATED: NotAuthenticatedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitExceededError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimedOutError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.FAILED_PRECONDITION: ConflictError,
    grpc.StatusCode.ALREADY_EXISTS: ConflictError,
    grpc.StatusCode.ABORTED: ConflictError,
    grpc.StatusCode.UNIMPLEMENTED: UsageError,
}


class FieldError(UsageError):
    """A field of a request is wrong; `field` is its path in the message."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


def code_of(error: KfacDistError) -> grpc.StatusCode:
    """Return the code of an error's class, or of its nearest base in the table."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return grpc.StatusCode.INTERNAL


def to_status(error: KfacDistError) -> status_pb2.Status:
    """Return an error as it is sent."""
    reason = next((k.__name__ for k in type(error).__mro__ if k in CODES), type(error).__name__)
    status = status_pb2.Status(code=code_of(error).value[0], message=error.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    if isinstance(error, FieldError):
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field=error.field, description=error.message)
        status.details.add().Pack(bad)
    return status


def from_rpc_error(error: grpc.RpcError, address: str) -> KfacDistError:
    """Return the error that the failure of a call to the server at `address` stands for."""
    call: Any = error  # gRPC's stubs do not say it, but a call's RpcError is also a grpc.Call
    code: grpc.StatusCode = call.code()
    message: str = call.details() or code.name
    kind = _sent_class(call) or _CLASS_OF_CODE.get(code)
    if kind is UnreachableError:
        return UnreachableError(f"{address}: no answer from the server: {message}")
    if kind is TimedOutError:
        return TimedOutError(f"{address}: no answer in time: {message}")
    if kind is not None:
        return kind(message)
    return KfacDistError(f"{address}: the server failed ({code.name}): {message}")


def _sent_class(call: grpc.Call) -> type[KfacDistError] | None:
    """Return the class that the ErrorInfo names, None if no known class is named."""
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the details contradict the code; then only the code counts
        return None
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            return _CLASSES.get(info.reason)
    return None
