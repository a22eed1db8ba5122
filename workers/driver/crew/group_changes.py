"""Changes of the group: members die, stall, leave and join, and the step in hand is repeated.

Who the gradient workers are from then on is decided by the rule in `coordination.steps.membership`.
Each change makes a new epoch: a new process group, in which every member has a new place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import ray

from kfac_dist.coordination.steps.membership import (
    MembershipDecision,
    MembershipLimits,
    MembershipView,
    decide_membership,
)
from kfac_dist.errors import KfacDistError, WorkerDiedError
from workers.actor import Ref
from workers.driver.crew.failures import Member, MemberLostError, failure_of, finished
from workers.driver.crew.healing import (
    StepReports,
    healed_snapshot,
    last_whole_step,
    reported_decisions,
    whole_reports,
)
from workers.driver.crew.processes import (
    Calls,
    CrewPlan,
    GroupProcess,
    call,
    member_at,
    start_process,
    with_shard,
    with_worker,
)
from workers.exchange.arrays import Array, to_array, to_tensor
from workers.exchange.member_progress import MemberProgress
from workers.exchange.messages import JobContext, MemberPlace, ServerReport
from workers.exchange.shard_plan import (
    ShardPlan,
    merge_snapshots,
    split_snapshot,
)
from workers.parameter_server.inverse_store import REMEMBERED_STATISTICS

_AVERAGE = "average:average"

ChangeKind = Literal["member_died", "member_left", "member_joined"]

# Ray's stubs leave much untyped.
_ray: Any = ray


@dataclass(frozen=True, kw_only=True)
class GroupChange:
    """A change of the members, for records and people; it takes effect after `step`."""

    kind: ChangeKind
    member: Member
    step: int
    epoch: int
    num_workers: int
    num_shards: int
    is_degraded: bool
    message: str


class GroupCalls(Protocol):
    """What a change needs of the crew: how to wait for calls, and how to form a group."""

    def gather(self, calls: Calls) -> list[Any]:
        """Wait for all `calls` and return their results in order."""

    def settle(self, calls: Calls) -> list[GroupProcess]:
        """Wait until all calls have ended, however they end; return the processes that died."""

    def wait(self) -> None:
        """Let a moment pass, and handle what has happened."""

    def form_group(self, processes: Sequence[GroupProcess], shards: ShardPlan, step: int) -> int:
        """Form a group of these processes after `step`, and return its epoch."""

    def forget(self, process: GroupProcess) -> None:
        """Forget all about a process that is gone, and end it if it is not."""


class GroupChanges:
    """Owns the processes of the group; `shards` is how the parameters are cut now."""

    def __init__(
        self,
        job: JobContext,
        plan: CrewPlan,
        processes: Sequence[GroupProcess],
        calls: GroupCalls,
        on_change: Callable[[GroupChange], None],
    ) -> None:
        self.processes = list(processes)
        self.shards = plan.shards
        self.last_report: ServerReport | None = None
        self._accepted_statistics: deque[int] = deque(maxlen=REMEMBERED_STATISTICS)
        self.wished = job.spec.workers.gradient
        self._job = job
        self._plan = plan
        self._calls = calls
        self._on_change = on_change
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
        reports = whole_reports(progress, steps, self._plan.layers, self.last_report)
        self.note(reports)
        self._change(lost.cause, dead, (), last)
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
        decision = self._decide((), leaving)
        if decision.step == "continue" and all(p.place.worker is not None for p in leaving):
            self._start(decision.num_to_start)
            return
        self._change(WorkerDiedError(decision.message), (), leaving, step)

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

    def _decide(
        self, dead: Sequence[GroupProcess], leaving: Sequence[GroupProcess]
    ) -> MembershipDecision:
        view = MembershipView(
            members=tuple(process.number for process in with_worker(self.processes)),
            dead=[process.number for process in dead],
            leaving=[process.number for process in leaving],
            ready=[process.number for process in self._ready()],
            num_starting=len(self._starting) - len(self._ready()),
            wished=self.wished,
            room=self._room(),
            num_deaths=self._num_deaths,
            num_preemptions=self._num_preemptions,
        )
        return decide_membership(view, self._limits)

    def _ready(self) -> list[GroupProcess]:
        ended = finished(self._starting)
        for ref in [ref for ref in ended if failure_of(ref) is not None]:
            self._calls.forget(self._starting.pop(ref))
            self._num_deaths += 1
        return [self._starting[ref] for ref in ended if ref in self._starting]

    def _room(self) -> int:
        free: dict[str, float] = _ray.available_resources()
        threads = self._job.spec.workers.threads or 1
        return int(free.get("CPU", 0.0) // threads)

    def _start(self, count: int) -> None:
        taken = {process.place.worker for process in self.processes}
        taken |= {process.place.worker for process in self._starting.values()}
        for _ in range(count):
            rank = next(rank for rank in range(len(taken) + 1) if rank not in taken)
            taken.add(rank)
            place = MemberPlace(worker=rank, shard=None, num_shards=len(self.shards))
            process = start_process(self._job, self._plan, place, self._num_started)
            self._num_started += 1
            self._starting[process.handle.build.remote(self._plan.buffers, None)] = process

    def _change(
        self,
        cause: KfacDistError,
        dead: Sequence[GroupProcess],
        leaving: Sequence[GroupProcess],
        step: int,
    ) -> None:
        """Form the next group, after `step`, once there are enough gradient workers."""
        workers = [process for process in dead if process.place.worker is not None]
        decision = self._decide(workers, leaving)
        counted = decision.num_deaths + len(dead) - len(workers) + (not dead and not leaving)
        for process in dead:
            self._calls.forget(process)
        gone = [*dead, *leaving]
        while decision.step == "wait":
            self._start(decision.num_to_start)
            self._calls.wait()
            decision = self._decide(workers, leaving)
        if decision.step == "fail" or counted > self._limits.max_restarts:
            raise _too_often(cause, counted, self._limits.max_restarts, decision)
        self._start(decision.num_to_start)
        by_number = {process.number: process for process in [*self.processes, *self._ready()]}
        if decision.step == "continue":  # only a dedicated shard died, or a connection
            members = with_worker([p for p in self.processes if p not in gone])
        else:
            members = [by_number[number] for number in decision.members]
        joined = [process for process in members if process not in self.processes]
        self._regroup(cause, members, dead, gone, joined, step)
        self._num_deaths, self._num_preemptions = counted, decision.num_preemptions
        self._tell(dead, leaving, joined, step, decision)

    def _regroup(
        self,
        cause: KfacDistError,
        members: Sequence[GroupProcess],
        dead: Sequence[GroupProcess],
        gone: Sequence[GroupProcess],
        joined: Sequence[GroupProcess],
        step: int,
    ) -> None:
        old = [process for process in self.processes if process not in dead]
        self._calls.gather(call(old, "rewind", [step]))
        alone = [p for p in old if p.place.worker is None and p not in gone]
        places = self._places(members, alone)
        processes = [*alone, *members]
        before = with_shard(self.processes)
        after = [
            p
            for _, p in sorted(
                (places[p.number].shard, p.number)
                for p in processes
                if places[p.number].shard is not None
            )
        ]
        intact = [p.number for p in before] == after
        if intact:
            for process in processes:
                process.place = places[process.number]
        else:
            snapshot = self._snapshot(cause, old, dead)
            self.shards = self._plan.plan_shards(max(1, len(after)))
            self._hand_out(processes, places, snapshot)
        for process in processes:
            process.member = member_at(process.place, process.member.pid)
        for process in joined:
            ref = next(ref for ref, other in self._starting.items() if other is process)
            process.member = replace(process.member, pid=ray.get(ref).pid)
            del self._starting[ref]
        for process in gone:
            if process not in dead:
                self._calls.forget(process)
        self._share_buffers(old, joined, gone)
        self.processes = processes
        self._epoch = self._calls.form_group(processes, self.shards, step)

    def _places(
        self, members: Sequence[GroupProcess], alone: Sequence[GroupProcess]
    ) -> dict[int, MemberPlace]:
        """Return the place of each process: ranks as given, and which shards they have."""
        if self._job.spec.workers.has_colocated_shards:
            num_shards = len(self._plan.plan_shards(len(members)))
            owners: dict[int, int] = {members[s].number: s for s in range(num_shards)}
        else:
            num_shards = len(self.shards)
            owners = {
                process.number: process.place.shard
                for process in [*alone, *members]
                if process.place.shard is not None
            }
            free = [process for process in members if process.number not in owners]
            for shard in sorted(set(range(num_shards)) - set(owners.values())):
                # A shard whose process is gone moves into that of a gradient worker.
                owners[free.pop(0).number] = shard
        ranks: dict[int, int | None] = {process.number: None for process in alone}
        ranks |= {process.number: rank for rank, process in enumerate(members)}
        return {
            number: MemberPlace(worker=rank, shard=owners.get(number), num_shards=num_shards)
            for number, rank in ranks.items()
        }

    def _snapshot(
        self,
        cause: KfacDistError,
        old: Sequence[GroupProcess],
        dead: Sequence[GroupProcess],
    ) -> Mapping[str, Array]:
        """Return the state of the whole parameter server, from its shards or from the mirrors."""
        shards = with_shard(old)
        own = self._calls.gather(call(shards, "snapshot", []))
        if not with_shard(dead):
            return merge_snapshots(self.shards, own)
        # What the shard that died had: parameters and previous update are mirrored, inverses are
        # sent again by the inverse workers.
        workers = with_worker(old)
        if not self._plan.has_mirrors or not workers:
            raise cause
        (state,) = self._calls.gather(call(workers[:1], "mirrored_state", []))
        decided = next((s for p, s in zip(shards, own, strict=True) if p.place.shard == 0), None)
        last = self.last_report
        if decided is None:
            decided = reported_decisions(last) if last else self._plan.server_snapshot or {}
        averages = self._averages(cause, dict(zip(shards, own, strict=True)), workers)
        return healed_snapshot(state, decided, last) | averages

    def _averages(
        self,
        cause: KfacDistError,
        alive: Mapping[GroupProcess, Mapping[str, Array]],
        workers: Sequence[GroupProcess],
    ) -> dict[str, Array]:
        """Return the average of the parameters, from the shards that live and from mirrors."""
        if self._job.spec.optimizer.averaging is None:
            return {}
        by_shard = {process.place.shard: snapshot for process, snapshot in alive.items()}
        num_workers = len(with_worker(self.processes))
        parts: list[Mapping[str, Array]] = []
        for shard in range(len(self.shards)):
            if shard in by_shard:
                parts.append(by_shard[shard])
                continue
            rank = (shard + 1) % num_workers
            mirrors = [process for process in workers if process.place.worker == rank]
            if not mirrors:
                raise cause
            (part,) = self._calls.gather(call(mirrors, "mirrored_average", [shard]))
            parts.append(part)
        names = [name for name in parts[0] if name.startswith("average:")]
        if _AVERAGE not in names:
            return {}
        slices = [to_tensor(part[_AVERAGE]) for part in parts]
        whole = to_array(self.shards.whole(slices))
        return {name: parts[0][name] for name in names} | {_AVERAGE: whole}

    def _hand_out(
        self,
        processes: Sequence[GroupProcess],
        places: Mapping[int, MemberPlace],
        snapshot: Mapping[str, Array],
    ) -> None:
        accepted = tuple(self._accepted_statistics)
        calls: Calls = {}
        for process in processes:
            place = places[process.number]
            part = None
            if place.shard is not None:
                part = split_snapshot(self.shards, snapshot, place.shard)
            calls[process.handle.own_shard.remote(place, part, accepted)] = process.member
            process.place = place
        self._calls.gather(calls)

    def _share_buffers(
        self,
        old: Sequence[GroupProcess],
        joined: Sequence[GroupProcess],
        gone: Sequence[GroupProcess],
    ) -> None:
        """Give those that join the buffers of a model that has been trained."""
        trained = [process for process in with_worker(old) if process not in gone]
        if self._plan.has_buffers and joined and trained:
            (buffers,) = self._calls.gather(call(trained[:1], "buffers", []))
            self._calls.gather(call(joined, "set_buffers", [buffers]))

    def _tell(
        self,
        dead: Sequence[GroupProcess],
        leaving: Sequence[GroupProcess],
        joined: Sequence[GroupProcess],
        step: int,
        decision: MembershipDecision,
    ) -> None:
        kinds: list[tuple[ChangeKind, Sequence[GroupProcess]]] = [
            ("member_died", dead),
            ("member_left", leaving),
            ("member_joined", joined),
        ]
        for kind, processes in kinds:
            for process in processes:
                self._on_change(
                    GroupChange(
                        kind=kind,
                        member=process.member,
                        step=step,
                        epoch=self._epoch,
                        num_workers=len(with_worker(self.processes)),
                        num_shards=len(self.shards),
                        is_degraded=decision.is_degraded,
                        message=decision.message,
                    )
                )

    def end(self) -> None:
        """End all processes, those that are starting as well."""
        for process in [*self.processes, *self._starting.values()]:
            ray.kill(process.handle)


def _too_often(
    cause: KfacDistError, num_deaths: int, most: int, decision: MembershipDecision
) -> KfacDistError:
    """Return `cause`, with the limit that keeps the job from continuing."""
    why = decision.message
    if decision.step != "fail":
        why = f"members of the group were lost {num_deaths} times, faults.max_restarts is {most}"
    if not isinstance(cause, WorkerDiedError):
        return cause
    return WorkerDiedError(f"{cause.message}; {why}", first_failure=cause.first_failure)
