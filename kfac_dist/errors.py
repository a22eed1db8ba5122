"""Every error a user can meet, in one tree.

    KfacDistError
    ├── UsageError                  2  a command line or a request is wrong
    ├── InvalidSpecError            3  the job specification is wrong, or does not fit this machine
    ├── NotFoundError               4  a file, run or job does not exist
    │   └── DataNotFoundError       4  a data set was not found in any of the places searched
    ├── UnreachableError            5  a server, database or Ray cluster does not answer
    ├── NotAllowedError             6  the token's role does not permit the request
    │   ├── NotAuthenticatedError   6  the token is missing, unknown, revoked or expired
    │   └── LimitExceededError      6  the request exceeds a limit of the server
    ├── TimedOutError               7  an answer did not come before its deadline
    ├── CancelledError              8  the job was cancelled
    ├── ConflictError               9  the request contradicts what already exists
    └── JobFailedError              1  the job started and failed, for a machine-readable `reason`:
        ├── DataError               1  bad_data: the data set has a value that cannot be used
        ├── NumericError            1  bad_steps: too many steps without a finite update
        ├── UserTaskError           1  user_task: the user's task raised an exception
        └── WorkerDiedError         1  worker_died: a process that the job needs has died

The number is the exit code of the command line. Any other exception is a bug of kfac_dist and
exits with 70. A message says what is wrong, where, with which value, and what would be right; it
can be understood without a traceback.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar


class KfacDistError(Exception):
    """The base of all errors that a user sees as one message."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        """Store `message`, the whole text that the user sees."""
        super().__init__(message)
        self.message = message


class UsageError(KfacDistError):
    """A command line, an argument or a field of a request is wrong."""

    exit_code = 2


class InvalidSpecError(KfacDistError, ValueError):
    """The job specification is wrong, or asks for more than the machine has."""

    exit_code = 3


class NotFoundError(KfacDistError):
    """A file, run, job or other thing that the user named does not exist."""

    exit_code = 4


class DataNotFoundError(NotFoundError):
    """A data set was not found in any of the places searched."""


class UnreachableError(KfacDistError):
    """A server, database or Ray cluster does not answer."""

    exit_code = 5


class NotAllowedError(KfacDistError):
    """The role of the caller's token does not permit the request."""

    exit_code = 6


class NotAuthenticatedError(NotAllowedError):
    """The call has no token, or one that is unknown, revoked or expired."""


class LimitExceededError(NotAllowedError):
    """The request exceeds a limit of the server, on one user or one message."""


class TimedOutError(KfacDistError):
    """An answer did not come before its deadline."""

    exit_code = 7


class CancelledError(KfacDistError):
    """The job was cancelled."""

    exit_code = 8


class ConflictError(KfacDistError):
    """The request contradicts what exists, such as an occupied run folder or a job's state."""

    exit_code = 9


@dataclass(frozen=True, kw_only=True)
class FirstFailure:
    """The failure that came first; later ones are usually its consequences.

    `role` and `rank` name the worker. `time_seconds` is Unix time, `log_tail` the last lines of
    that worker's log.
    """

    role: str
    rank: int
    time_seconds: float
    log_tail: str


class JobFailedError(KfacDistError):
    """The job started and failed."""

    reason: str = "failed"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        first_failure: FirstFailure | None = None,
    ) -> None:
        """Store the message, a machine-readable `reason` and the failure that came first."""
        super().__init__(message)
        self.reason = reason or type(self).reason
        self.first_failure = first_failure

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the keyword arguments too, which the default of exceptions would lose."""
        state = {"reason": self.reason, "first_failure": self.first_failure}
        return type(self), (self.message,), state


class DataError(JobFailedError):
    """The data set has a value that cannot be used, such as NaN."""

    reason = "bad_data"


class NumericError(JobFailedError):
    """More than `faults.max_bad_steps` steps had no finite update."""

    reason = "bad_steps"


class UserTaskError(JobFailedError):
    """The user's task raised an exception."""

    reason = "user_task"


class WorkerDiedError(JobFailedError):
    """A process that the job needs has died."""

    reason = "worker_died"


def reason_of(error: KfacDistError) -> str:
    """Return an error's machine-readable reason, by default from its class.

    A JobFailedError carries its own; a TimedOutError gives `timed_out`.
    """
    if isinstance(error, JobFailedError):
        return error.reason
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()
