"""In which states can a job be, and which events lead from one state to the next?

    PENDING -> QUEUED -> STARTING | RESUMING -> RUNNING <-> DEGRADED -> SUCCEEDED | FAILED
               ^  ^  |                             |
               |  |  +-> PAUSED <- PAUSING <-------+     (PAUSED -> QUEUED by `resume`)
               |  +---- restart by itself                 CANCELLING -> CANCELLED
               +------- `retry` of FAILED, CANCELLED

A job that waits for room is QUEUED, whatever it was before. So a job that is PENDING, QUEUED or
PAUSED has no process anywhere, and cancelling it takes effect at once. In all other
states before its end the job has an attempt. That attempt is first asked to end; the job changes
its state once it is proved that nothing of the attempt is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from kfac_dist.errors import ConflictError


class JobState(StrEnum):
    """The state of a job."""

    PENDING = "PENDING"
    """Accepted and stored; the controller has not looked at it yet."""
    QUEUED = "QUEUED"
    """Waits for room on the cluster, or for jobs before it."""
    STARTING = "STARTING"
    """The cluster was asked to run an attempt from the first step."""
    RUNNING = "RUNNING"
    """Trains."""
    DEGRADED = "DEGRADED"
    """Trains without some of its workers."""
    PAUSING = "PAUSING"
    """Was asked to write a checkpoint and end."""
    PAUSED = "PAUSED"
    """Has no process; continues from its newest checkpoint when it is resumed."""
    RESUMING = "RESUMING"
    """The cluster was asked to run an attempt that continues earlier ones."""
    CANCELLING = "CANCELLING"
    """Is being ended; parts of it may still be alive."""
    SUCCEEDED = "SUCCEEDED"
    """Completed its last step."""
    FAILED = "FAILED"
    """Could not continue."""
    CANCELLED = "CANCELLED"
    """Ended on request; nothing of it is left."""


class Trigger(StrEnum):
    """What happens to a job: a user's request, the controller's decision, or a driver's report."""

    ENQUEUE = "enqueue"
    """The controller has seen the job."""
    LAUNCH = "launch"
    """The controller gives the job to the cluster, to start from the first step."""
    RELAUNCH = "relaunch"
    """The controller gives the job to the cluster, to continue earlier attempts."""
    RUN = "run"
    """The driver reports that it trains with all workers."""
    DEGRADE = "degrade"
    """The driver reports that it trains without some workers."""
    PAUSE = "pause"
    """A user wants the job paused."""
    HALT = "halt"
    """The attempt of a pausing job has ended; nothing of it is left."""
    RESUME = "resume"
    """A user wants a paused job to continue."""
    CANCEL = "cancel"
    """A user wants the job ended."""
    VANISH = "vanish"
    """The attempt of a cancelled job has ended; nothing of it is left."""
    SUCCEED = "succeed"
    """The driver completed the last step."""
    FAIL = "fail"
    """The attempt ended with an error or was lost, and the job is not restarted."""
    RESTART = "restart"
    """The attempt ended with an error, and the job continues without a user's request."""
    RETRY = "retry"
    """A user wants a failed or cancelled job to continue."""


_S, _E = JobState, Trigger

ENDED = frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELLED})
"""The job has ended: nothing more happens unless a user asks for it."""

ACTIVE = frozenset({_S.STARTING, _S.RESUMING, _S.RUNNING, _S.DEGRADED, _S.PAUSING, _S.CANCELLING})
"""The states in which the job has an attempt on the cluster."""

_WAITING = (_S.PENDING, _S.QUEUED)
_TRAINING = (_S.STARTING, _S.RESUMING, _S.RUNNING, _S.DEGRADED)

_NEXT: Mapping[Trigger, Mapping[JobState, JobState]] = {
    _E.ENQUEUE: {_S.PENDING: _S.QUEUED},
    _E.LAUNCH: {_S.QUEUED: _S.STARTING},
    _E.RELAUNCH: {_S.QUEUED: _S.RESUMING},
    # A report that was sent before the driver received an order changes nothing.
    _E.RUN: dict.fromkeys(_TRAINING, _S.RUNNING)
    | {_S.PAUSING: _S.PAUSING, _S.CANCELLING: _S.CANCELLING},
    _E.DEGRADE: dict.fromkeys(_TRAINING, _S.DEGRADED)
    | {_S.PAUSING: _S.PAUSING, _S.CANCELLING: _S.CANCELLING},
    _E.PAUSE: dict.fromkeys(_WAITING, _S.PAUSED)
    | dict.fromkeys((*_TRAINING, _S.PAUSING), _S.PAUSING)
    | {_S.PAUSED: _S.PAUSED},
    _E.HALT: {_S.PAUSING: _S.PAUSED},
    _E.RESUME: {_S.PAUSED: _S.QUEUED},
    _E.CANCEL: dict.fromkeys((*_WAITING, _S.PAUSED), _S.CANCELLED)
    | dict.fromkeys((*_TRAINING, _S.PAUSING, _S.CANCELLING), _S.CANCELLING),
    _E.VANISH: {_S.CANCELLING: _S.CANCELLED},
    # A job that completed its last step before an order reached it has succeeded.
    _E.SUCCEED: dict.fromkeys((*_TRAINING, _S.PAUSING, _S.CANCELLING), _S.SUCCEEDED),
    _E.FAIL: dict.fromkeys((*_TRAINING, _S.PAUSING), _S.FAILED),
    _E.RESTART: dict.fromkeys(_TRAINING, _S.QUEUED),
    _E.RETRY: {_S.FAILED: _S.QUEUED, _S.CANCELLED: _S.QUEUED},
}

_REQUESTS = (_E.PAUSE, _E.RESUME, _E.CANCEL, _E.RETRY)


def next_state(state: JobState, event: Trigger) -> JobState:
    """Return the state after `event`.

    Raises:
        ConflictError: `event` cannot happen in this state; the message names the possible requests.
    """
    try:
        return _NEXT[event][state]
    except KeyError:
        raise ConflictError(_refusal(state, event)) from None


def possible_requests(state: JobState) -> tuple[Trigger, ...]:
    """Return the requests that a user may make in this state."""
    return tuple(event for event in _REQUESTS if state in _NEXT[event])


def _refusal(state: JobState, event: Trigger) -> str:
    possible = ", ".join(possible_requests(state)) or "nothing, this state is final"
    return f"{event} is not possible while the job is {state}; possible now: {possible}"
