"""Changes of the group: members die, stall, leave and join, and the step in hand is repeated.

Who the gradient workers are from then on is decided by the rule in `coordination.steps.membership`.
Each change makes a new epoch: a new process group, in which every member has a place.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from kfac_dist.coordination.steps.membership import (
    MembershipDecision,
    MembershipLimits,
    MembershipView,
    decide_membership,
)
from kfac_dist.errors import WorkerDiedError
from workers.actor import Ref
from workers.driver.crew.failures import Member, MemberLostError, failure_of, finished
from workers.driver.crew.handover import Handover
from workers.driver.crew.healing import (
    StepInHand,
    StepReports,
    has_gone_beyond,
    last_whole_step,
    whole_reports,
)
from workers.driver.crew.losses import ChangeKind, GroupChange, Losses, Observer, too_often
from workers.driver.crew.processes import (
    Calls,
    CrewPlan,
    GroupCalls,
    GroupProcess,
    call,
    member_at,
    place_members,
    start_process,
    with_shard,
    with_worker,
)
from workers.exchange.arrays import Array
from workers.exchange.member_progress import MemberProgress
from workers.exchange.messages import JobContext, MemberPlace, ServerReport
from workers.parameter_server.inverse_store import REMEMBERED_STATISTICS

_SILENT_WAIT_SECONDS = 1.0  # Ray gives the room of a process that is gone free within this time

# Ray's stubs leave much untyped.
_ray: Any = ray


class GroupChanges:
    """Owns the processes of the group; `shards` is how the parameters are cut now."""

    def __init__(
        self,
        job: JobContext,
        plan: CrewPlan,
        processes: Sequence[GroupProcess],
        calls: GroupCalls,
        observer: Observer,
    ) -> None:
        self.processes = list(processes)
        self.shards = plan.shards
        self.last_report: ServerReport | None = None
        self._accepted_statistics: deque[int] = deque(maxlen=REMEMBERED_STATISTICS)
        self.wished = job.spec.workers.gradient
        self._job = job
        self._plan = plan
        self._calls = calls
        self._observer = observer
        self._handover = Handover(plan, calls, averages=job.spec.optimizer.averaging is not None)
        self._untold: list[tuple[ChangeKind, Member]] = []
        self._told = {""}  # why there are fewer members than are wished for
        self._without_buffers: list[GroupProcess] = []  # they have joined, and have not got them
        self._buffers: Mapping[str, Array] = {}  # for those
        self._starting: dict[Ref, GroupProcess] = {}
        self._num_started = len(self.processes)
        self._num_deaths = 0
        self._num_preemptions = 0
        faults = job.spec.faults
        self._limits = MembershipLimits(
            min_gradient_workers=faults.min_gradient_workers,
            max_restarts=faults.max_restarts,
            max_preemptions=faults.max_preemptions,
        )

    def restart(self, lost: MemberLostError) -> GroupProcess | None:
        """Before the first step, start a process in place of one that is lost, and return it.

        Raises:
            KfacDistError: processes were lost too often.
        """
        self._num_deaths += 1
        if self._num_deaths > self._limits.max_restarts:
            raise too_often(lost.cause, self._num_deaths, self._limits.max_restarts)
        self._observer.on_notice("member_start_failed", f"{lost.cause.message}; it starts again")
        dead = next((p for p in self.processes if p.member == lost.member), None)
        if dead is None:
            return None
        self._calls.forget(dead)
        process = start_process(self._job, self._plan, dead.place, self._num_started)
        self._num_started += 1
        self.processes[self.processes.index(dead)] = process
        return process

    def recover(self, lost: MemberLostError, calls: Calls, first_step: int) -> list[StepReports]:
        """Form a new group without a member that is lost, and return the reports of whole steps.

        The step after those is to be repeated; the group is back in the state before it.

        Args:
            lost: the error that a call raised.
            calls: all open calls to the members.
            first_step: the first step of the window in hand, or the next one between two windows.

        Raises:
            KfacDistError: the job cannot continue without the member.
        """
        dead = [process for process in self.processes if process.member == lost.member]
        dead += [p for p in self._calls.settle(calls) if p not in dead]
        alive = [process for process in self.processes if process not in dead]
        progress = self._progress(alive, dead)
        last = last_whole_step(progress, first_step) if progress else first_step - 1
        steps = range(first_step, last + 1)
        reports = whole_reports(
            progress, steps, self._plan.layers, self.last_report, len(self.shards)
        )
        self.note(reports)
        in_hand = StepInHand(begun=bool(calls), undone=has_gone_beyond(progress, last))
        losses = Losses(cause=lost.cause, step=last, dead=dead, num_cuts=int(not dead))
        losses.in_hand = in_hand
        self._change(losses)
        return reports

    def note(self, reports: Sequence[StepReports]) -> None:
        """Remember what a shard that takes over from another one has to know."""
        for report in reports:
            self.last_report = report.server
            if report.server.accepted_statistics:
                self._accepted_statistics.append(report.server.step)

    def maintain(self, step: int, preempted: Sequence[Member]) -> None:
        """Between two windows, take in processes that are ready and let those leave that must."""
        leaving = [process for process in self.processes if process.member in preempted]
        losses = Losses(cause=WorkerDiedError(""), step=step, leaving=leaving)
        decision = self._decide(losses)
        if decision.step == "continue" and all(p.place.worker is not None for p in leaving):
            self._start(decision.num_to_start, losses)
            if decision.message not in self._told:
                self._told.add(decision.message)
                self._observer.on_notice("scale_waits", decision.message)
            return
        losses.cause = WorkerDiedError(decision.message)
        self._change(losses)

    def _progress(
        self, alive: list[GroupProcess], dead: list[GroupProcess]
    ) -> list[MemberProgress]:
        """Ask the living how far they are; a process that dies now is moved to `dead`."""
        calls = {process.handle.progress.remote(): process for process in alive}
        died = self._calls.settle({ref: process.member for ref, process in calls.items()})
        for process in died:
            alive.remove(process)
            dead.append(process)
        return [ray.get(ref) for ref, process in calls.items() if process in alive]

    def _decide(self, losses: Losses) -> MembershipDecision:
        ready = self._ready()
        num_starting = len(self._starting) - len(ready)
        members = with_worker(self.processes)
        numbers = {process.number for process in losses.gone}
        staying = sum(process.number not in numbers for process in members)
        is_short = self.wished > staying + len(self._starting)
        view = MembershipView(
            members=tuple(process.number for process in members),
            dead=[process.number for process in losses.dead],
            leaving=[process.number for process in losses.leaving],
            ready=[process.number for process in ready],
            num_starting=num_starting,
            wished=self.wished,
            room=self._room() if is_short else 0,
            num_deaths=self._num_deaths,
            num_preemptions=self._num_preemptions,
        )
        return decide_membership(view, self._limits)

    def _ready(self) -> list[GroupProcess]:
        ended = finished(self._starting)
        for ref in ended:
            if (error := failure_of(ref)) is not None:
                process = self._starting.pop(ref)
                self._calls.forget(process)
                self._num_deaths += 1
                message = f"a successor did not start: {type(error).__name__}: {error}"
                self._observer.on_notice("member_start_failed", message.splitlines()[0])
        return [self._starting[ref] for ref in ended if ref in self._starting]

    def _room(self) -> int:
        free: dict[str, float] = _ray.available_resources()
        threads = self._job.spec.workers.threads or 1
        return int(free.get("CPU", 0.0) // threads)

    def _start(self, count: int, losses: Losses) -> None:
        present = [*self.processes, *self._starting.values()]
        taken = {process.place.worker for process in present if process not in losses.gone}
        for _ in range(count):
            rank = next(rank for rank in range(len(taken) + 1) if rank not in taken)
            taken.add(rank)
            place = MemberPlace(worker=rank, shard=None, num_shards=len(self.shards))
            process = start_process(self._job, self._plan, place, self._num_started)
            self._num_started += 1
            self._starting[process.handle.build.remote(self._plan.buffers, None)] = process

    def _change(self, losses: Losses) -> None:
        """Form the next group; another time, if another member is lost meanwhile."""
        while True:
            try:
                self._form(losses)
                return
            except MemberLostError as lost:
                found = [p for p in self.processes if p.member == lost.member]
                losses.cause = lost.cause
                losses.num_cuts += not found
                losses.dead += [p for p in found if p not in losses.dead]
                losses.leaving = [p for p in losses.leaving if p not in losses.dead]

    def _form(self, losses: Losses) -> None:
        """Form the next group once there are enough gradient workers.

        Raises:
            MemberLostError: another member was lost.
        """
        alive = [process for process in self.processes if process not in losses.dead]
        self._handover.check(losses.cause, alive, losses.dead)
        decision = self._await_enough(losses)
        old = [process for process in self.processes if losses.answers(process)]
        self._calls.gather(call(old, "rewind", [losses.step]))
        by_number = {process.number: process for process in [*self.processes, *self._ready()]}
        members = [by_number[number] for number in decision.members]
        if decision.step == "continue":  # only a dedicated shard is gone, or a connection
            members = [p for p in with_worker(self.processes) if p not in losses.gone]
        alone = [p for p in old if p.place.worker is None and p not in losses.leaving]
        places = self._places(members, alone)
        self._find_buffers(losses, old, members)
        before = [process.number for process in with_shard(self.processes)]
        if before != _owners_in_order(places):
            silent = [p for p in self.processes if p not in old]
            self._handover.take(losses.cause, old, silent, self.shards, self.last_report)
        self._commit(losses, decision, [*alone, *members], places)
        self._hand_out()
        epoch = self._calls.form_group(self.processes, self.shards, losses.step)
        self._handover.end()
        self._tell(losses, epoch, decision)

    def _await_enough(self, losses: Losses) -> MembershipDecision:
        """Wait until there are enough gradient workers, and start those that are missing.

        Raises:
            KfacDistError: members were lost too often.
        """
        for process in losses.dead:
            self._calls.forget(process)
        started, told = time.monotonic(), set[str]()
        decision = self._decide(losses)
        while decision.step == "wait":
            # Their place may be needed, and a checkpoint has been written.
            for process in losses.leaving:
                self._calls.forget(process)
            losses.ended = list(losses.leaving)
            self._start(decision.num_to_start, losses)
            self._calls.wait()
            waited = time.monotonic() - started
            if decision.message not in told and waited > _SILENT_WAIT_SECONDS:
                told.add(decision.message)
                self._observer.on_notice("members_awaited", decision.message)
            decision = self._decide(losses)
        num_deaths = decision.num_deaths + self._num_uncounted(losses)
        if decision.step == "fail":
            raise too_often(losses.cause, num_deaths, self._limits.max_restarts, decision.message)
        if num_deaths > self._limits.max_restarts:
            raise too_often(losses.cause, num_deaths, self._limits.max_restarts)
        self._start(decision.num_to_start, losses)
        return decision

    @staticmethod
    def _num_uncounted(losses: Losses) -> int:
        """Return how many losses the rule about gradient workers does not count."""
        return losses.num_cuts + sum(process.place.worker is None for process in losses.dead)

    def _places(
        self, members: Sequence[GroupProcess], alone: Sequence[GroupProcess]
    ) -> dict[int, MemberPlace]:
        """Return the place of each process, by its number."""
        shared = self._job.spec.workers.has_colocated_shards
        num_shards = len(self._plan.plan_shards(len(members)) if shared else self.shards)
        return place_members(members, alone, num_shards, shared=shared)

    def _find_buffers(
        self, losses: Losses, old: Sequence[GroupProcess], members: Sequence[GroupProcess]
    ) -> None:
        """Read the buffers that the model has come to, for the members that join.

        Raises:
            KfacDistError: nobody has them any more; it is the cause of the change.
        """
        trained = [p for p in with_worker(old) if p not in self._without_buffers]
        if not self._plan.has_buffers or all(process in trained for process in members):
            return
        if not trained:
            raise losses.cause
        (self._buffers,) = self._calls.gather(call(trained[:1], "buffers", []))

    def _commit(
        self,
        losses: Losses,
        decision: MembershipDecision,
        processes: Sequence[GroupProcess],
        places: dict[int, MemberPlace],
    ) -> None:
        """From now on these are the members, whatever happens to them; all losses are counted."""
        gone = [*losses.dead, *losses.leaving]
        dropped = [p for p in self.processes if p not in processes and p not in gone]
        joined = [process for process in processes if process not in self.processes]
        left = [*losses.leaving, *dropped]
        losses.loses_buffers |= self._plan.has_buffers and bool(with_worker([*gone, *dropped]))
        self._untold += [("member_died", process.member) for process in losses.dead]
        self._untold += [("member_left", process.member) for process in left]
        for process in left:
            self._calls.forget(process)
        for process in joined:
            ref = next(ref for ref, other in self._starting.items() if other is process)
            process.member = replace(process.member, pid=ray.get(ref).pid)
            del self._starting[ref]
        for process in processes:
            process.place = places[process.number]
            process.member = member_at(process.place, process.member.pid)
        self._untold += [("member_joined", process.member) for process in joined]
        self._without_buffers += joined
        self.processes = list(processes)
        self.shards = self._plan.plan_shards(processes[0].place.num_shards)
        alone = sum(process.place.worker is None for process in losses.leaving)
        self._num_deaths = decision.num_deaths + self._num_uncounted(losses)
        self._num_preemptions = decision.num_preemptions + alone
        losses.dead, losses.leaving, losses.ended, losses.num_cuts = [], [], [], 0

    def _hand_out(self) -> None:
        """Give each member what it needs to be in its place."""
        accepted = tuple(self._accepted_statistics)
        self._handover.give(self.processes, self.shards, accepted)
        joined = [process for process in self._without_buffers if process in self.processes]
        if self._plan.has_buffers:
            self._calls.gather(call(joined, "set_buffers", [self._buffers]))
        self._without_buffers = []

    def _tell(self, losses: Losses, epoch: int, decision: MembershipDecision) -> None:
        untold, self._untold = self._untold, []
        self._told = {"", decision.message}
        for kind, member in untold:
            self._observer.on_change(
                GroupChange(
                    kind=kind,
                    member=member,
                    step=losses.step,
                    epoch=epoch,
                    num_workers=len(with_worker(self.processes)),
                    num_shards=len(self.shards),
                    is_degraded=decision.is_degraded,
                    in_hand=losses.in_hand,
                    loses_buffers=losses.loses_buffers,
                    message=decision.message,
                )
            )

    def end(self) -> None:
        """End all processes, those that are starting as well."""
        for process in [*self.processes, *self._starting.values()]:
            ray.kill(process.handle)


def _owners_in_order(places: dict[int, MemberPlace]) -> list[int]:
    """Return the numbers of the processes that have a shard, in the order of the shards."""
    owners = {place.shard: n for n, place in places.items() if place.shard is not None}
    return [owners[shard] for shard in sorted(owners)]
