"""What the controller does about an attempt, from what is known of it: rules without a clock.

Three witnesses speak: the driver by its reports, the run folder, and the cluster. The cluster's
word counts least: its table of jobs loses entries, keeps some PENDING forever, and RUNNING means
only that a driver was started.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from kfac_dist.coordination.jobs.lifecycle import JobState, Trigger

# After these a job goes on by itself: it is not the job that is wrong.
RESTARTABLE = frozenset({"worker_died", "driver_died", "interrupted"})


ClusterWord = Literal["unknown", "pending", "running", "over"]
"""What the cluster says of a driver."""


class Action(StrEnum):
    """What to do now."""

    WAIT = "wait"
    SUBMIT = "submit"
    """Ask the cluster, which does not know of the attempt."""
    STOP = "stop"
    """Let the driver be ended in order."""
    KILL = "kill"
    """End everything by force."""
    SETTLE = "settle"
    """Prove that nothing is left, then let `event` happen to the job."""


@dataclass(frozen=True, kw_only=True)
class WaitLimits:
    """How long the controller waits, in seconds.

    `start` for the first word of a driver, `cancel` and `pause` for an order to be obeyed, `stop`
    for a driver that was told to end by the cluster, `exit` for one that has told its end,
    `silence` for a driver that the cluster has forgotten, `doubt` for one that reports although
    the cluster says that it is over.
    """

    start_seconds: float = 120.0
    cancel_seconds: float = 10.0
    pause_seconds: float = 90.0
    stop_seconds: float = 10.0
    exit_seconds: float = 20.0
    silence_seconds: float = 30.0
    doubt_seconds: float = 5.0


@dataclass(frozen=True, kw_only=True)
class AttemptView:
    """What is known of an attempt; seconds are since then, None is never.

    `job_state` was entered `state_seconds` ago. `told_end` is how the attempt ended by its own
    word, with its `reason` and `message`.
    """

    job_state: JobState
    state_seconds: float
    cancel_now: bool
    attempt_seconds: float
    silent_seconds: float | None
    told_end: JobState | None
    told_seconds: float
    reason: str | None
    message: str | None
    cluster: ClusterWord
    cluster_message: str
    num_restarts: int
    max_restarts: int


@dataclass(frozen=True, kw_only=True)
class Decision:
    """An action; with SETTLE the event that happens to the job, and why."""

    action: Action
    event: Trigger | None = None
    reason: str | None = None
    message: str | None = None


def decide(view: AttemptView, limits: WaitLimits) -> Decision:
    """Return what to do about an attempt."""
    if _is_over(view, limits) or _is_lost(view, limits):
        return _settle(view, limits)
    if view.told_end is not None:
        return _overdue(view.told_seconds, limits.exit_seconds, limits)
    if view.job_state is JobState.CANCELLING:
        if view.cancel_now:
            return Decision(action=Action.KILL)
        return _overdue(view.state_seconds, limits.cancel_seconds, limits)
    if view.job_state is JobState.PAUSING:
        return _overdue(view.state_seconds, limits.pause_seconds, limits)
    if view.silent_seconds is None:
        if view.attempt_seconds > limits.start_seconds:
            return Decision(action=Action.KILL)
        if view.cluster == "unknown":
            return Decision(action=Action.SUBMIT)
    return Decision(action=Action.WAIT)


def _is_over(view: AttemptView, limits: WaitLimits) -> bool:
    """Whether the cluster says that the driver has ended, and the driver does not say otherwise."""
    if view.cluster != "over":
        return False
    if view.told_end is not None or view.job_state is JobState.CANCELLING:
        return True
    return view.silent_seconds is None or view.silent_seconds > limits.doubt_seconds


def _is_lost(view: AttemptView, limits: WaitLimits) -> bool:
    """Whether nothing is to be expected of an attempt that the cluster does not know.

    It is so at once where the driver has told its end, or is to end and was never heard of.
    """
    if view.cluster != "unknown":
        return False
    if view.told_end is not None:
        return True
    if view.silent_seconds is not None:
        return view.silent_seconds > limits.silence_seconds
    ordered = view.job_state in (JobState.CANCELLING, JobState.PAUSING)
    return ordered or view.attempt_seconds > limits.start_seconds


def _overdue(seconds: float, patience: float, limits: WaitLimits) -> Decision:
    """Wait, then stop, then kill."""
    if seconds <= patience:
        return Decision(action=Action.WAIT)
    if seconds <= patience + limits.stop_seconds:
        return Decision(action=Action.STOP)
    return Decision(action=Action.KILL)


def _settle(view: AttemptView, limits: WaitLimits) -> Decision:
    if view.told_end is JobState.SUCCEEDED:
        return _end(Trigger.SUCCEED)
    if view.job_state is JobState.CANCELLING:
        return _end(Trigger.VANISH, "requested", "cancelled by request; nothing of it is left")
    if view.told_end is JobState.FAILED and view.reason not in RESTARTABLE:
        return _end(Trigger.FAIL, view.reason or "failed", view.message)
    if view.job_state is JobState.PAUSING and view.told_end is not JobState.FAILED:
        return _end(Trigger.HALT, "requested", "paused by request; nothing of it runs")
    reason, message = _misfortune(view, limits)
    if reason in RESTARTABLE and view.job_state is not JobState.PAUSING:
        if view.num_restarts < view.max_restarts:
            return _end(Trigger.RESTART, reason, message)
        message += f"; restarted {view.num_restarts} times, faults.max_restarts is "
        message += str(view.max_restarts)
    return _end(Trigger.FAIL, reason, message)


def _misfortune(view: AttemptView, limits: WaitLimits) -> tuple[str, str]:
    """Say what ended an attempt that nobody asked to end."""
    if view.told_end is JobState.FAILED:
        return view.reason or "failed", view.message or "the attempt failed"
    if view.told_end is not None:
        return "interrupted", "the driver was interrupted by somebody else"
    said = f" ({view.cluster_message})" if view.cluster_message else ""
    if view.silent_seconds is None and view.attempt_seconds > limits.start_seconds:
        seconds = f"{limits.start_seconds:g} s"
        return "start_timed_out", f"the driver did not report within {seconds}{said}"
    return "driver_died", f"the driver ended without a word{said}"


def _end(event: Trigger, reason: str | None = None, message: str | None = None) -> Decision:
    return Decision(action=Action.SETTLE, event=event, reason=reason, message=message)
