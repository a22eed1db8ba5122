"""Who are the gradient workers of the next epoch?

A process group is numbered by its *epoch*. The members of an epoch never change: when one dies,
stalls, is asked to leave or is ready to join, the driver ends the epoch, and a new one begins with
the members that are decided here. A rule without a clock: the view says what has been seen.

A *process* has a number of its own for its whole life; its *rank* is its place in an epoch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from kfac_dist.coordination.checks import check_interval
from kfac_dist.errors import InvalidSpecError

Step = Literal["continue", "new_epoch", "wait", "fail"]


@dataclass(frozen=True, kw_only=True)
class MembershipLimits:
    """What a job survives; see `faults` of the specification."""

    min_gradient_workers: int
    max_restarts: int
    max_preemptions: int | None

    def __post_init__(self) -> None:
        check_interval("faults.min_gradient_workers", self.min_gradient_workers, 1)
        check_interval("faults.max_restarts", self.max_restarts, 0)
        check_interval("faults.max_preemptions", self.max_preemptions or 0, 0)


@dataclass(frozen=True, kw_only=True)
class MembershipView:
    """What is known of a job's gradient workers."""

    members: tuple[int, ...]
    """The processes of the epoch, in the order of their ranks."""
    dead: Collection[int] = ()
    """Members whose process is gone, or that stalled and were killed; not counted before."""
    leaving: Collection[int] = ()
    """Members whose process has notice that it will be ended; not counted before."""
    ready: Sequence[int] = ()
    """Processes that have started and can join, in the order in which they were started."""
    num_starting: int = 0
    """Processes that have been started and are not ready."""
    wished: int
    """The number of gradient workers that the specification, or the last wish, asks for."""
    room: int = 0
    """How many processes more the cluster has room for."""
    num_deaths: int = 0
    """Deaths so far in the job, without those in `dead`."""
    num_preemptions: int = 0
    """Notices so far in the job, without those in `leaving`."""

    def __post_init__(self) -> None:
        check_interval("wished gradient workers", self.wished, 1)
        processes = [*self.members, *self.ready]
        twice = {process for process in processes if processes.count(process) > 1}
        if twice:
            raise InvalidSpecError(f"process {min(twice)} is given more than once")


@dataclass(frozen=True, kw_only=True)
class MembershipDecision:
    """What to do now.

    Attributes:
        step: continue with the present epoch; begin a new one with `members`; wait for processes
            or room; or fail, for `reason`.
        members: with `new_epoch`, the processes of the epoch in the order of their ranks.
        num_to_start: how many processes to start now, whatever `step` is.
        is_degraded: there are fewer members than are wished for.
        num_deaths: deaths so far in the job, with those that were seen now.
        num_preemptions: notices so far in the job, with those that were seen now.
        message: why, for people; empty if all is well.
        reason: a machine-readable word, with `fail` only.
    """

    step: Step
    members: tuple[int, ...]
    num_to_start: int
    is_degraded: bool
    num_deaths: int
    num_preemptions: int
    message: str = ""
    reason: str | None = None


def decide_membership(view: MembershipView, limits: MembershipLimits) -> MembershipDecision:
    """Decide who the gradient workers are from now on.

    Ranks are kept where that is possible: a process that joins takes the place of one that is
    gone, and only where there are not enough of them the members of the highest ranks move down.
    If fewer are wished for, those of the highest ranks leave; never below the minimum.
    """
    gone = {process for process in view.members if process in {*view.dead, *view.leaving}}
    deaths = view.num_deaths + len(gone.intersection(view.dead))
    notices = view.num_preemptions + len(gone.difference(view.dead))
    wished = max(view.wished, limits.min_gradient_workers)
    members = _in_ranks(view.members, gone, view.ready, wished)
    missing = wished - len(members) - view.num_starting
    start = max(0, min(missing, view.room))
    if failure := _failure(deaths, notices, limits):
        reason, message = failure
        return MembershipDecision(
            step="fail",
            members=(),
            num_to_start=0,
            is_degraded=True,
            message=message,
            reason=reason,
            num_deaths=deaths,
            num_preemptions=notices,
        )
    enough = len(members) >= limits.min_gradient_workers
    step: Step = "new_epoch" if members != view.members else "continue"
    return MembershipDecision(
        step=step if enough else "wait",
        members=members if enough else (),
        num_to_start=start,
        is_degraded=len(members) < wished,
        num_deaths=deaths,
        num_preemptions=notices,
        message=_message(view, len(members), wished, start, limits),
    )


def _in_ranks(
    members: Sequence[int], gone: Collection[int], ready: Sequence[int], wished: int
) -> tuple[int, ...]:
    """Return who holds each rank, from 0, without gaps."""
    joining = list(ready)
    places: list[int | None] = [None if process in gone else process for process in members]
    for rank, process in enumerate(places):
        if process is None and joining and rank < wished:
            places[rank] = joining.pop(0)
    free = wished - len(members)
    places += joining[: max(0, free)]
    living = sum(process is not None for process in places)
    size = min(wished, living)
    # Members beyond the last rank move down to the ranks that are still free, or leave.
    moving = [process for process in places[size:] if process is not None]
    return tuple(moving.pop(0) if process is None else process for process in places[:size])


def _failure(deaths: int, notices: int, limits: MembershipLimits) -> tuple[str, str] | None:
    if deaths > limits.max_restarts:
        return (
            "worker_died",
            f"gradient workers died {deaths} times, faults.max_restarts is {limits.max_restarts}",
        )
    if limits.max_preemptions is not None and notices > limits.max_preemptions:
        return (
            "preempted",
            f"gradient workers were preempted {notices} times, faults.max_preemptions is "
            f"{limits.max_preemptions}",
        )
    return None


def _message(
    view: MembershipView, num_members: int, wished: int, start: int, limits: MembershipLimits
) -> str:
    if num_members >= wished:
        return ""
    there = f"{num_members} of {wished} gradient workers are there"
    coming = view.num_starting + start
    missing = wished - num_members - coming
    parts = [f"{coming} are starting"] if coming else []
    if missing:
        parts.append(f"for {missing} the cluster has no room")
    least = limits.min_gradient_workers
    if num_members < least:
        parts.append(f"the job waits, because faults.min_gradient_workers is {least}")
    else:
        parts.append("the job trains meanwhile")
    return "; ".join([there, *parts])
