"""Errors on the wire: one table from the project's errors to gRPC's codes, read both ways.

An error travels as a google.rpc.Status: the code, the message a user sees, and an ErrorInfo whose
reason is the name of the error's class; a FieldError adds a BadRequest that names the field.
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
"""The code of each error; a subclass that is not here has that of its base."""

_CLASSES: dict[str, type[KfacDistError]] = {kind.__name__: kind for kind in CODES}

# What gRPC or a proxy answers by itself, without an ErrorInfo.
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
    """Return the code of an error: its class's, or that of the nearest base in the table."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return grpc.StatusCode.INTERNAL


def to_status(error: KfacDistError) -> status_pb2.Status:
    """Return the error as it goes over the wire."""
    reason = next((k.__name__ for k in type(error).__mro__ if k in CODES), type(error).__name__)
    status = status_pb2.Status(code=code_of(error).value[0], message=error.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    if isinstance(error, FieldError):
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field=error.field, description=error.message)
        status.details.add().Pack(bad)
    return status


def from_rpc_error(error: grpc.RpcError, address: str) -> KfacDistError:
    """Return what the failure of a call to the server at `address` means to its user."""
    call: Any = error  # every RpcError of a call is a grpc.Call as well
    code: grpc.StatusCode = call.code()
    message: str = call.details() or code.name
    kind = _told_class(call) or _CLASS_OF_CODE.get(code)
    if kind is UnreachableError:
        return UnreachableError(f"{address}: no answer from the server: {message}")
    if kind is TimedOutError:
        return TimedOutError(f"{address}: no answer in time: {message}")
    if kind is not None:
        return kind(message)
    return KfacDistError(f"{address}: the server failed ({code.name}): {message}")


def _told_class(call: grpc.Call) -> type[KfacDistError] | None:
    """The class that the ErrorInfo names, None when there is no such."""
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the details contradict the code, which then counts alone
        return None
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            return _CLASSES.get(info.reason)
    return None
