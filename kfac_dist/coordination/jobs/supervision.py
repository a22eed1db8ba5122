"""What should the controller do about an attempt, given what is known about it?

There are three sources: the driver's reports, the run folder, and the cluster. The cluster is
trusted least. Its table of jobs loses entries and keeps some PENDING forever, and RUNNING there
means only that a driver was started. The rules have no clock: the view says how long things last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from typing import Literal

from kfac_dist.coordination.jobs.lifecycle import JobState, Trigger
from kfac_dist.coordination.jobs.placement import NO_ROOM_REASON

RESTARTABLE = frozenset({"worker_died", "driver_died", "interrupted", "peers_lost", "node_lost"})
"""Reasons after which a job is restarted without a request: the job itself is not to blame."""

PREEMPTED_REASON = "preempted"
"""A worker had notice that its machine is taken away; restarted, and counted apart."""

_FROM_OUTSIDE = frozenset({"interrupted", "node_lost"})
"""Reasons that say nothing about the job, however often they come."""

ClusterWord = Literal["unknown", "pending", "running", "over"]
"""What the cluster says about a driver."""


class Action(StrEnum):
    """What the controller does now."""

    WAIT = "wait"
    SUBMIT = "submit"
    """Submit the attempt, which the cluster does not know."""
    STOP = "stop"
    """Ask the cluster to end the driver, so that it can still clean up."""
    KILL = "kill"
    """End everything by force."""
    SETTLE = "settle"
    """Prove that nothing of the attempt is left, then apply `event` to the job."""


@dataclass(frozen=True, kw_only=True)
class WaitLimits:
    """How long the controller waits before it does more."""

    start_seconds: float = 120.0
    """For the first report of a driver."""
    cancel_seconds: float = 10.0
    """For a driver to obey an order to cancel."""
    pause_seconds: float = 90.0
    """For a driver to obey an order to pause; it first writes a checkpoint."""
    stop_seconds: float = 10.0
    """For a driver to exit that the cluster has asked to end."""
    exit_seconds: float = 20.0
    """For a driver to exit that has reported its end."""
    silence_seconds: float = 30.0
    """For the next report of a driver that the cluster does not know any more."""
    doubt_seconds: float = 5.0
    """For the next report of a driver that the cluster calls over."""
    first_rest_seconds: float = 2.0
    """Before the first automatic restart; each further rest is four times as long."""
    longest_rest_seconds: float = 300.0
    """Before any automatic restart."""
    same_failures: int = 3
    """Failures in a row for the same reason at the same step, after which a job is given up."""

    def rest_seconds(self, num_restarts: int) -> float:
        """Return the rest before the automatic restart with this number, from 1; 0 before none."""
        if num_restarts < 1:
            return 0.0
        # Beyond this exponent the rest is the longest anyway, and the power would overflow.
        longer = 4.0 ** min(num_restarts - 1, 50)
        return min(self.first_rest_seconds * longer, self.longest_rest_seconds)


@dataclass(frozen=True, kw_only=True)
class EarlierEnd:
    """How an earlier attempt ended, and the last step that was recorded then."""

    reason: str | None
    step: int


@dataclass(frozen=True, kw_only=True)
class AttemptView:
    """What is known about an attempt; each `*_seconds` is the time since something happened."""

    job_state: JobState
    state_seconds: float
    """Since the job entered `job_state`."""
    cancel_now: bool
    """A cancelled job is to be ended by force, without waiting for its driver."""
    attempt_seconds: float
    """Since the attempt was begun."""
    silent_seconds: float | None
    """Since the driver's last report; None before the first."""
    told_end: JobState | None
    """The end that the driver has reported, with its `reason` and `message`."""
    told_seconds: float
    """Since `told_end` was reported."""
    reason: str | None
    message: str | None
    cluster: ClusterWord
    cluster_message: str
    num_restarts: int
    max_restarts: int
    num_preemptions: int = 0
    """Attempts that ended because a worker was preempted, this one included."""
    max_preemptions: int | None = None
    step: int = 0
    """The last step that is recorded."""
    earlier: Sequence[EarlierEnd] = ()
    """The attempts before this one since a user last asked for one, newest first."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """An action; with SETTLE also the event that happens to the job, and why."""

    action: Action
    event: Trigger | None = None
    reason: str | None = None
    message: str | None = None


def decide(view: AttemptView, limits: WaitLimits) -> Decision:
    """Return what to do about an attempt."""
    if _is_over(view, limits) or _is_lost(view, limits):  # no driver runs
        return _settle(view, limits)
    if view.told_end is not None:
        return _overdue(view.told_seconds, limits.exit_seconds, limits)
    if view.job_state is JobState.CANCELLING:
        if view.cancel_now:
            return Decision(action=Action.KILL)
        return _overdue(view.state_seconds, limits.cancel_seconds, limits)
    if view.job_state is JobState.PAUSING:
        return _overdue(view.state_seconds, limits.pause_seconds, limits)
    if view.silent_seconds is None:  # it has not started yet
        if view.attempt_seconds > limits.start_seconds:
            return Decision(action=Action.KILL)
        if view.cluster == "unknown":
            return Decision(action=Action.SUBMIT)
    return Decision(action=Action.WAIT)


def _is_over(view: AttemptView, limits: WaitLimits) -> bool:
    """Return whether the cluster calls the driver over and no report contradicts it."""
    if view.cluster != "over":
        return False
    if view.told_end is not None or view.job_state is JobState.CANCELLING:
        return True
    return view.silent_seconds is None or view.silent_seconds > limits.doubt_seconds


def _is_lost(view: AttemptView, limits: WaitLimits) -> bool:
    """Return whether nothing more will come from an attempt that the cluster does not know.

    That is certain at once if the driver has reported its end, or if it should end and has never
    reported.
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
    """Wait for `patience` seconds, then stop, and kill if that does not help either."""
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
    if view.told_end is JobState.FAILED and view.reason in (NO_ROOM_REASON, PREEMPTED_REASON):
        return _settle_uncounted(view)
    if view.told_end is JobState.FAILED and view.reason not in RESTARTABLE:
        return _end(Trigger.FAIL, view.reason or "failed", view.message)
    if view.job_state is JobState.PAUSING and view.told_end is not JobState.FAILED:
        return _end(Trigger.HALT, "requested", "paused by request; nothing of it runs")
    reason, message = _misfortune(view, limits)
    if reason in RESTARTABLE and view.job_state is not JobState.PAUSING:
        same = _same_failures(view, reason)
        if view.num_restarts < view.max_restarts and same < limits.same_failures:
            return _end(Trigger.RESTART, reason, message)
        if same >= limits.same_failures:
            message += f"; failed {same} times in a row at step {view.step}, without progress"
        message += f"; restarted {view.num_restarts} times, faults.max_restarts is "
        message += str(view.max_restarts)
    return _end(Trigger.FAIL, reason, message)


def _settle_uncounted(view: AttemptView) -> Decision:
    """Settle an attempt whose end is not the fault of the job, and not counted as a restart.

    An attempt without room has not begun, and the queue knows when there is room. A preempted one
    has left a checkpoint.
    """
    if view.job_state is JobState.PAUSING:
        return _end(Trigger.HALT, "requested", "paused by request; nothing of it runs")
    most = view.max_preemptions
    if view.reason == PREEMPTED_REASON and most is not None and view.num_preemptions > most:
        limit = f"preempted {view.num_preemptions} times, faults.max_preemptions is {most}"
        return _end(Trigger.FAIL, view.reason, f"{view.message}; {limit}")
    return _end(Trigger.RESTART, view.reason, view.message)


def _same_failures(view: AttemptView, reason: str) -> int:
    """Return how many attempts in a row, with this one, ended for `reason` at the present step."""
    if reason in _FROM_OUTSIDE:
        return 0
    same = takewhile(lambda end: (end.reason, end.step) == (reason, view.step), view.earlier)
    return 1 + sum(1 for _ in same)


def _misfortune(view: AttemptView, limits: WaitLimits) -> tuple[str, str]:
    """Return the reason and the message for an attempt that ended although nobody asked it to."""
    if view.told_end is JobState.FAILED:
        return view.reason or "failed", view.message or "the attempt failed"
    if view.told_end is not None:
        return "interrupted", "the driver was interrupted from outside"
    detail = f" ({view.cluster_message})" if view.cluster_message else ""
    if view.silent_seconds is None and view.attempt_seconds > limits.start_seconds:
        seconds = f"{limits.start_seconds:g} s"
        return "start_timed_out", f"the driver did not report within {seconds}{detail}"
    return "driver_died", f"the driver ended without reporting its end{detail}"


def _end(event: Trigger, reason: str | None = None, message: str | None = None) -> Decision:
    return Decision(action=Action.SETTLE, event=event, reason=reason, message=message)
