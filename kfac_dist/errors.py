"""Every error a user can meet, in one tree.

    KfacDistError
    ├── UsageError           2   the command line is wrong
    ├── InvalidSpecError     3   the job specification is wrong, or cannot be placed here
    ├── NotFoundError        4   a file, a data set, a run or a job is not there
    │   └── DataNotFoundError
    ├── UnreachableError     5   no server, no Ray cluster
    ├── NotAllowedError      6   the token does not permit it
    │   ├── NotAuthenticatedError   there is no token, or none that is known
    │   └── LimitExceededError      more than one user may have at once
    ├── TimedOutError        7
    ├── CancelledError       8
    ├── ConflictError        9   an occupied run folder, a checkpoint of another job
    └── JobFailedError       1   the job ran and failed; carries a machine `reason`
        ├── DataError            bad_data: a value in the data set is not usable
        ├── NumericError         bad_steps: too many steps without a finite update
        ├── UserTaskError        user_task: the user's task raised
        └── WorkerDiedError      worker_died: a process the job cannot go on without

The number is the exit code of the command line; an error that is none of these is a bug of ours and
exits with 70. A message says what, where, the value and what
would be right; it is complete without a traceback.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar


class KfacDistError(Exception):
    """Base of all errors that are shown to a user as one message."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        """Keep `message`, the whole text the user sees."""
        super().__init__(message)
        self.message = message


class UsageError(KfacDistError):
    """The command line itself is wrong."""

    exit_code = 2


class InvalidSpecError(KfacDistError, ValueError):
    """The job specification is wrong, or asks for more than there is."""

    exit_code = 3


class NotFoundError(KfacDistError):
    """Something that was named does not exist."""

    exit_code = 4


class DataNotFoundError(NotFoundError):
    """A data set is in none of the places where it is looked for."""


class UnreachableError(KfacDistError):
    """A server or a Ray cluster does not answer."""

    exit_code = 5


class NotAllowedError(KfacDistError):
    """The caller's role does not permit the request."""

    exit_code = 6


class NotAuthenticatedError(NotAllowedError):
    """The server does not know who is asking."""


class LimitExceededError(NotAllowedError):
    """The request asks for more than one user, or one message, may have."""


class TimedOutError(KfacDistError):
    """An answer did not come within its deadline."""

    exit_code = 7


class CancelledError(KfacDistError):
    """The job was cancelled."""

    exit_code = 8


class ConflictError(KfacDistError):
    """The request contradicts what is already there."""

    exit_code = 9


@dataclass(frozen=True, kw_only=True)
class FirstFailure:
    """The failure that came first; later ones are mostly its echoes.

    `time_seconds` is Unix time, `log_tail` the last lines of that worker's log.
    """

    role: str
    rank: int
    time_seconds: float
    log_tail: str


class JobFailedError(KfacDistError):
    """The job ran and could not go on."""

    reason: str = "failed"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        first_failure: FirstFailure | None = None,
    ) -> None:
        """Keep the message, a machine-readable `reason` and the failure that came first."""
        super().__init__(message)
        self.reason = reason or type(self).reason
        self.first_failure = first_failure

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with the keyword arguments: these errors cross process boundaries."""
        state = {"reason": self.reason, "first_failure": self.first_failure}
        return type(self), (self.message,), state


class DataError(JobFailedError):
    """A value in the data set cannot be used, such as a NaN."""

    reason = "bad_data"


class NumericError(JobFailedError):
    """More steps without a finite update than `faults.max_bad_steps`."""

    reason = "bad_steps"


class UserTaskError(JobFailedError):
    """The user's task class raised."""

    reason = "user_task"


class WorkerDiedError(JobFailedError):
    """A process died that the job cannot go on without."""

    reason = "worker_died"


def reason_of(error: KfacDistError) -> str:
    """Return the machine word of an error: its own, or of TimedOutError timed_out."""
    if isinstance(error, JobFailedError):
        return error.reason
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()
