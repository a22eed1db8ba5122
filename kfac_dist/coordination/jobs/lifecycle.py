"""The life of a job: its states, what may happen to it, and what follows.

    PENDING -> QUEUED -> STARTING | RESUMING -> RUNNING <-> DEGRADED -> SUCCEEDED | FAILED
               ^  ^  |                             |
               |  |  +-> PAUSED <- PAUSING <-------+     (PAUSED -> QUEUED by `resume`)
               |  +---- restart by itself                 CANCELLING -> CANCELLED
               +------- `retry` of FAILED, CANCELLED

What waits for room is QUEUED, whatever it was before: so PENDING, QUEUED and PAUSED have no process
anywhere, and an order to end takes effect at once. All other states that are no end have an
attempt, which is asked to end and then proved to be gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from kfac_dist.errors import ConflictError


class JobState(StrEnum):
    """Where a job stands."""

    PENDING = "PENDING"
    """Accepted and durable; nobody has looked at it."""
    QUEUED = "QUEUED"
    """Waits for room on the cluster, or for jobs before it."""
    STARTING = "STARTING"
    """The cluster was asked to run an attempt from the first step."""
    RUNNING = "RUNNING"
    """Trains."""
    DEGRADED = "DEGRADED"
    """Trains without some of its workers."""
    PAUSING = "PAUSING"
    """Was asked to leave a checkpoint and end."""
    PAUSED = "PAUSED"
    """Has no process; goes on at its newest checkpoint when it is resumed."""
    RESUMING = "RESUMING"
    """The cluster was asked to run an attempt that goes on with earlier ones."""
    CANCELLING = "CANCELLING"
    """Is being ended; parts of it may be alive."""
    SUCCEEDED = "SUCCEEDED"
    """Did its last step."""
    FAILED = "FAILED"
    """Could not go on."""
    CANCELLED = "CANCELLED"
    """Was ended on request, and nothing of it is left."""


class Trigger(StrEnum):
    """What happens to a job: requests of users, decisions of the controller, news of the driver."""

    ENQUEUE = "enqueue"
    """The controller has seen it."""
    LAUNCH = "launch"
    """The controller gives it to the cluster, from the first step."""
    RELAUNCH = "relaunch"
    """The controller gives it to the cluster, to go on."""
    RUN = "run"
    """The driver says that it trains with all workers."""
    DEGRADE = "degrade"
    """The driver says that it trains without some workers."""
    PAUSE = "pause"
    """A user wants it paused."""
    HALT = "halt"
    """A paused attempt has ended and nothing of it is left."""
    RESUME = "resume"
    """A user wants it to go on."""
    CANCEL = "cancel"
    """A user wants it ended."""
    VANISH = "vanish"
    """A cancelled attempt has ended and nothing of it is left."""
    SUCCEED = "succeed"
    """The driver did the last step."""
    FAIL = "fail"
    """The attempt ended with an error, or was lost, and is not started again."""
    RESTART = "restart"
    """The attempt ended with an error and the job goes on by itself."""
    RETRY = "retry"
    """A user wants an ended job to go on."""


_S, _E = JobState, Trigger

ENDED = frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELLED})
"""States in which nothing happens any more unless a user asks."""

ACTIVE = frozenset({_S.STARTING, _S.RESUMING, _S.RUNNING, _S.DEGRADED, _S.PAUSING, _S.CANCELLING})
"""States in which there is an attempt on the cluster."""

_WAITING = (_S.PENDING, _S.QUEUED)
_TRAINING = (_S.STARTING, _S.RESUMING, _S.RUNNING, _S.DEGRADED)

_NEXT: Mapping[Trigger, Mapping[JobState, JobState]] = {
    _E.ENQUEUE: {_S.PENDING: _S.QUEUED},
    _E.LAUNCH: {_S.QUEUED: _S.STARTING},
    _E.RELAUNCH: {_S.QUEUED: _S.RESUMING},
    # News that crosses an order on its way changes nothing.
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
    # A job that did its last step before an order reached it has succeeded.
    _E.SUCCEED: dict.fromkeys((*_TRAINING, _S.PAUSING, _S.CANCELLING), _S.SUCCEEDED),
    _E.FAIL: dict.fromkeys((*_TRAINING, _S.PAUSING), _S.FAILED),
    _E.RESTART: dict.fromkeys(_TRAINING, _S.QUEUED),
    _E.RETRY: {_S.FAILED: _S.QUEUED, _S.CANCELLED: _S.QUEUED},
}

_REQUESTS = (_E.PAUSE, _E.RESUME, _E.CANCEL, _E.RETRY)


def next_state(state: JobState, event: Trigger) -> JobState:
    """Return the state after `event`.

    Raises:
        ConflictError: that cannot happen in this state; the message says what a user may ask for.
    """
    try:
        return _NEXT[event][state]
    except KeyError:
        raise ConflictError(_refusal(state, event)) from None


def possible_requests(state: JobState) -> tuple[Trigger, ...]:
    """Return what a user may ask for in this state."""
    return tuple(event for event in _REQUESTS if state in _NEXT[event])


def _refusal(state: JobState, event: Trigger) -> str:
    possible = ", ".join(possible_requests(state)) or "nothing, its end is final"
    return f"{event} is not possible while the job is {state}; possible is: {possible}"
