"""The one way to wait for calls to actors, and what is noticed meanwhile.

A *call* is a method of an actor that has been invoked and has not been waited for. In every wait
the driver sees interrupts, deaths and stalls of all roles, and what happens to Ray's daemons.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from kfac_dist.errors import KfacDistError, TimedOutError
from kfac_dist.runs import RunFolder
from workers.actor import Handle, Ref
from workers.cluster.daemons import DaemonWatch
from workers.cluster.interrupts import Interrupts
from workers.cluster.lost import lost_node_error, stopped_daemon_error
from workers.driver.crew.failures import (
    Member,
    MemberLostError,
    failed_among,
    failure_of,
    finished,
    first_cause,
    is_death,
    job_error,
    stall_error,
)
from workers.driver.crew.health import Health, Stall
from workers.driver.crew.inverse.inverse_pool import ROLE as INVERSE_ROLE
from workers.driver.crew.inverse.inverse_pool import InversePool
from workers.driver.crew.inverse.successors import Successors
from workers.driver.crew.processes import Calls, CrewPlan, GroupProcess
from workers.exchange.messages import JobContext
from workers.exchange.process_group import PeerLostError

_WAIT_SECONDS = 0.25  # how soon an interrupt is seen

# Ray's stubs leave much untyped.
_ray: Any = ray


class Waiter:
    """Waits for calls; `step` is the step that errors name.

    `processes` returns the present members of the group.
    """

    def __init__(
        self,
        job: JobContext,
        folder: RunFolder,
        plan: CrewPlan,
        interrupts: Interrupts,
        inverse_pool: InversePool,
        successors: Successors,
        processes: Callable[[], Sequence[GroupProcess]],
    ) -> None:
        self.step = 0
        self._job = job
        self._folder = folder
        self._plan = plan
        self._interrupts = interrupts
        self._inverse_pool = inverse_pool
        self._successors = successors
        self._processes = processes
        self._health = Health(job.spec.faults)
        self._checked_seconds = 0.0
        self._daemons = DaemonWatch(job.spec.faults.stall_seconds)

    def gather(self, calls: Calls, deadline_seconds: float = math.inf) -> list[Any]:
        """Wait for all `calls` and return their results in order.

        The death of an inverse worker is handled meanwhile and does not end the wait.

        Raises:
            KfacDistError: the cause of the first failure among `calls`, or a member stalls.
            TimedOutError: some calls did not return before the deadline.
        """
        pending = dict(calls)
        deadline = time.monotonic() + deadline_seconds
        while pending:
            if time.monotonic() > deadline:
                raise _start_timed_out(pending, deadline_seconds)
            ready = {ref: pending.pop(ref) for ref in self._wait(pending)}
            if failed := failed_among(ready):
                raise self._error(failed, pending)
        return list(ray.get(list(calls)))

    def gather_optional(self, calls: Calls) -> list[Any]:
        """Wait for all `calls` and return the results of those that did not fail."""
        pending = dict(calls)
        while pending:
            for ref in self._wait(pending):
                del pending[ref]
        failed = failed_among(calls)
        return list(ray.get([ref for ref in calls if ref not in failed]))

    def settle(self, calls: Calls) -> list[GroupProcess]:
        """Wait until all calls have ended, however they end; return the processes that died.

        Raises:
            KfacDistError: a member raised an error that is not the loss of another one.
        """
        pending = dict(calls)
        lost: set[Member] = set()
        while pending:
            try:
                ended = self._wait({ref: m for ref, m in pending.items() if m not in lost})
            except MemberLostError as loss:
                if loss.member is not None:
                    lost.add(loss.member)
                pending = {ref: m for ref, m in pending.items() if m not in lost}
                continue
            for ref in ended:
                member = pending.pop(ref)
                error = failure_of(ref)
                if error is not None and is_death(error):
                    lost.add(member)
                elif error is not None and not isinstance(error, PeerLostError):
                    raise self._job_error(member, error)
        return [process for process in self._processes() if process.member in lost]

    def wait(self) -> None:
        """Let a moment pass, and handle what has happened."""
        self._wait({})

    def forget(self, process: GroupProcess) -> None:
        """Forget all about a process that is gone, and end it if it is not."""
        self._health.forget(process.member)
        ray.kill(process.handle)

    def _wait(self, pending: Calls) -> list[Ref]:
        """Return the calls that have ended, possibly none; handle deaths of inverse workers."""
        self._interrupts.check()
        lifelines = self._inverse_pool.lifelines()
        awaited = [*pending, *lifelines]
        if not awaited:
            time.sleep(_WAIT_SECONDS)
        ready, _ = ray.wait(awaited, num_returns=1, timeout=_WAIT_SECONDS)
        dead = finished(lifelines)
        if dead or not ready:
            self._check_node()
        self._check_health()
        if not ready:
            self._inverse_pool.poll()
        for ref in dead:
            rank = self._inverse_pool.handle_death(ref)
            self._health.forget(Member(role=INVERSE_ROLE, rank=rank))
            self._successors.reconnect(rank)
        self._successors.catch_up(self.step)
        return finished(pending)

    def _check_node(self) -> None:
        lost = self._daemons.lost()
        if lost is None:
            return
        if lost.fate == "died":
            raise lost_node_error(lost.name, self.step)
        stall_seconds = self._job.spec.faults.stall_seconds
        raise stopped_daemon_error(lost.name, self.step, stall_seconds)

    def _check_health(self) -> None:
        """Ask all members for their pulse, from time to time, and kill those that stall.

        Raises:
            WorkerDiedError: a member stalls that the job cannot continue without.
        """
        now = time.monotonic()
        if now - self._checked_seconds < _WAIT_SECONDS:
            return
        self._checked_seconds = now
        self._check_node()
        self._health.ask(self._members() | self._inverse_pool.members())
        for stall in self._health.stalls():
            if stall.member.role == INVERSE_ROLE:
                self._inverse_pool.end_stalled(stall)
                self._health.forget(stall.member)
            else:
                raise self._stalled(stall)

    def _members(self) -> dict[Member, Handle]:
        return {process.member: process.handle for process in self._processes()}

    def _stalled(self, stall: Stall) -> MemberLostError:
        """Kill a member and return the error that names it."""
        process = next(p for p in self._processes() if p.member == stall.member)
        member = process.member
        ray.kill(process.handle)
        log = self._log(member)
        return MemberLostError(member, stall_error(member, stall.why, step=self.step, log=log))

    def _error(self, failed: Calls, pending: Calls) -> Exception:
        self._check_node()  # if the node is lost, who died on it says nothing
        member, error = first_cause(failed, pending)
        is_lost = isinstance(error, PeerLostError)
        suspect = self._health.suspect() if is_lost else None
        if suspect is not None and suspect.member.role != INVERSE_ROLE:
            return self._stalled(suspect)
        cause = self._job_error(member, error)
        is_ours = member in self._members()
        if is_lost:
            return MemberLostError(None, cause)
        return MemberLostError(member, cause) if is_ours and is_death(error) else cause

    def _job_error(self, member: Member, error: BaseException) -> KfacDistError:
        self._plan.catch_up_logs()
        return job_error(member, error, step=self.step, log=self._log(member))

    def _log(self, member: Member) -> Path:
        """Return the log of a member, which has the name of what it was started as."""
        logs = (process.log for process in self._processes() if process.member == member)
        own = next(logs, member)
        return self._folder.places.log(own.role, own.rank, self._job.attempt)

    def preempted(self) -> list[Member]:
        """Return the members that have had notice that their process will be ended."""
        return self._health.preempted()


def _start_timed_out(pending: Calls, seconds: float) -> TimedOutError:
    missing = ", ".join(str(member) for member in pending.values())
    free: dict[str, float] = _ray.available_resources()
    room = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU", "inverse"))
    return TimedOutError(
        f"{missing} did not start within {seconds:g} s; free in the Ray cluster: {room}"
    )
