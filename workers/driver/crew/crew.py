"""All actors of a job as the driver holds them, and the one way to wait for their calls.

A *call* is a method of an actor that has been invoked and has not been waited for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray

from kfac_dist.errors import KfacDistError, TimedOutError
from kfac_dist.runs import RunFolder, WorkerCounts
from workers.actor import Handle, Ref, node_address
from workers.cluster.daemons import DaemonWatch, daemons_awake
from workers.cluster.interrupts import Interrupts
from workers.cluster.lost import lost_node_error, stopped_daemon_error
from workers.driver.crew.deaths import InverseWorkerDied
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
from workers.driver.crew.group_changes import GroupChanges
from workers.driver.crew.healing import StepReports
from workers.driver.crew.health import Health, Stall, patience_seconds
from workers.driver.crew.inverse_pool import ROLE as INVERSE_ROLE
from workers.driver.crew.inverse_pool import InversePool
from workers.driver.crew.losses import Observer
from workers.driver.crew.processes import (
    Calls,
    CrewPlan,
    GroupProcess,
    GroupShape,
    call,
    first_places,
    start_process,
    with_shard,
    with_worker,
)
from workers.exchange.arrays import Array, to_array, to_tensor
from workers.exchange.messages import (
    InverseSetup,
    JobContext,
    MemberPlace,
    Rendezvous,
    StepOrder,
    merge_reports,
)
from workers.exchange.process_group import PeerLostError, host_store
from workers.exchange.shard_plan import ShardPlan, merge_snapshots, split_snapshot
from workers.gradient_worker.buffers import mean_buffers
from workers.member.actor import MemberReady

T = TypeVar("T")

OnLoss = Callable[[int, Sequence[int]], None]
"""Receives the rank of an inverse worker and the steps whose statistics it cannot get."""

_WAIT_SECONDS = 0.25  # how soon an interrupt is seen
_START_SECONDS = 300.0  # on a cluster without room an actor waits forever, without an error

# Ray's stubs leave much untyped.
_ray: Any = ray


class Crew:
    """The actors of a job, started by `launch`; `step` is the step that errors name."""

    def __init__(
        self,
        job: JobContext,
        folder: RunFolder,
        plan: CrewPlan,
        interrupts: Interrupts,
        *,
        processes: Sequence[GroupProcess],
        inverse_pool: InversePool,
        observer: Observer,
        on_loss: OnLoss,
    ) -> None:
        self.step = 0
        self.inverse_pool = inverse_pool
        self.changes = GroupChanges(job, plan, processes, self, observer)
        self._job = job
        self._folder = folder
        self._plan = plan
        self._interrupts = interrupts
        self._on_loss = on_loss
        self._catching_up: dict[int, Calls] = {}  # by rank; empty until the successor has started
        self._epoch = 0
        self._store: object  # where the members of a group meet
        self._health = Health(job.spec.faults)
        self._checked_seconds = 0.0
        self._daemons = DaemonWatch(job.spec.faults.stall_seconds)

    @classmethod
    def launch(
        cls,
        job: JobContext,
        folder: RunFolder,
        plan: CrewPlan,
        interrupts: Interrupts,
        on_death: Callable[[InverseWorkerDied], None],
        observer: Observer,
        on_loss: OnLoss,
    ) -> Crew:
        """Start all actors, without waiting until they are there; `build` comes next.

        Args:
            job: the job, as every actor receives it.
            folder: the run folder, where the logs of failed members are found.
            plan: which actors to start, and the state they start from.
            interrupts: checked in every wait.
            on_death: called in the middle of a wait for each inverse worker that dies; what it
                raises ends the job.
            observer: learns of each member that was lost, has left or has joined.
            on_loss: called where the successor of an inverse worker cannot get all statistics.
        """
        processes = [
            start_process(job, plan, place, number)
            for number, place in enumerate(first_places(job, len(plan.shards)))
        ]
        owners = _owners(processes, plan.shards)
        return cls(
            job,
            folder,
            plan,
            interrupts,
            processes=processes,
            inverse_pool=InversePool.launch(
                job, owners, plan.devices, plan.setups, plan.averages, on_death
            ),
            observer=observer,
            on_loss=on_loss,
        )

    @property
    def group_timeout_seconds(self) -> float:
        """How long a wait for a member of the group, or for an inverse worker, may take."""
        return patience_seconds(self._job.spec.faults)

    def build(self) -> MemberReady:
        """Have all actors load what they need, then form the process group.

        Returns what the first shard says of itself.

        Raises:
            KfacDistError: a member raised an error, or died.
            TimedOutError: an actor did not start in time.
        """
        processes = self.changes.processes
        calls = {self._build(process): process for process in processes}
        while True:
            try:
                self._await_built(calls)
                break
            except MemberLostError as lost:
                calls = {
                    ref: process for ref, process in calls.items() if process.member != lost.member
                }
                successor = self.changes.restart(lost)
                if successor is not None:
                    calls[self._build(successor)] = successor
                self.inverse_pool.set_owners(_owners(processes, self._plan.shards))
        built: dict[Ref, MemberReady] = dict(zip(calls, ray.get(list(calls)), strict=True))
        first: MemberReady = next(
            answer for ref, answer in built.items() if calls[ref].place.shard == 0
        )
        return first

    def _build(self, process: GroupProcess) -> Ref:
        snapshot = self._snapshot_of(process.place)
        built: Ref = process.handle.build.remote(self._plan.buffers, snapshot)
        return built

    def _await_built(self, calls: Mapping[Ref, GroupProcess]) -> None:
        members = {ref: process.member for ref, process in calls.items()}
        started = self.inverse_pool.first_statuses()
        ready = self.gather(members | started, deadline_seconds=_START_SECONDS)
        for process, answer in zip(calls.values(), ready, strict=False):
            process.member = replace(process.member, pid=answer.pid)
        self.inverse_pool.note_started(step=0)
        self.form_group(self.changes.processes, self._plan.shards, self._plan.start_step)

    def _snapshot_of(self, place: MemberPlace) -> Mapping[str, Array] | None:
        """Return a shard's part of the checkpoint from which the run resumes."""
        snapshot = self._plan.server_snapshot
        if snapshot is None or place.shard is None:
            return None
        return split_snapshot(self._plan.shards, snapshot, place.shard)

    def form_group(self, processes: Sequence[GroupProcess], shards: ShardPlan, step: int) -> int:
        """Form a group of these processes after `step`, and return its epoch."""
        self._epoch += 1
        host = self._plan.host or node_address()
        store = host_store(host, self.group_timeout_seconds)
        meet = Rendezvous(
            host=host,
            port=store.port,
            epoch=self._epoch,
            num_gradient_workers=len(with_worker(processes)),
            num_shards=len(shards),
            step=step,
            timeout_seconds=self.group_timeout_seconds,
        )
        calls = {
            process.handle.join.remote(meet, process.place): process.member for process in processes
        }
        try:
            self.gather(calls)
        except MemberLostError:
            del store  # those that wait there for the one that is gone wait no longer
            self.settle(calls)
            raise
        self._store = store  # that of the epoch before is closed only now
        if self._epoch > 1:
            self.inverse_pool.set_owners(_owners(processes, shards))
        self._connect(processes)
        return self._epoch

    @property
    def shape(self) -> GroupShape:
        """The size of the present group."""
        return GroupShape(
            epoch=self._epoch,
            gradient_workers=len(with_worker(self.changes.processes)),
            shards=len(self.changes.shards),
        )

    @property
    def counts(self) -> WorkerCounts:
        """The number of processes of each role now, where the server's are its shards."""
        return WorkerCounts(
            gradient=self.shape.gradient_workers,
            inverse=len(self.inverse_pool.setups),
            parameter_server=self.shape.shards,
        )

    def connect_inverse_workers(self) -> None:
        """Tell all members to which inverse worker they send what."""
        self._connect(self.changes.processes)

    def _connect(self, processes: Sequence[GroupProcess]) -> None:
        pool = self.inverse_pool
        if pool.assignment:
            epochs, copied = pool.assignment_epochs, pool.copied_steps
            self.gather(call(processes, "connect", (pool.handles, pool.assignment, epochs, copied)))

    def run(self, orders: Sequence[StepOrder]) -> list[StepReports]:
        """Have all members do the steps of a window, and return their reports by step.

        If a member is lost, there are reports only of the steps that were done before. Then the
        group has changed, and is ready for the step after those.
        """
        processes = self.changes.processes
        calls = call(processes, "run", [orders])
        try:
            answers = dict(zip((p.number for p in processes), self.gather(calls), strict=True))
        except MemberLostError as lost:
            return self.changes.recover(lost, calls, orders[0].plan.step)
        workers = [answers[process.number] for process in with_worker(processes)]
        shards = [answers[process.number] for process in with_shard(processes)]
        reports = [
            StepReports(
                server=merge_reports([own[k].shard for own in shards], self._plan.layers),
                workers=[own[k].worker for own in workers],
            )
            for k in range(len(orders))
        ]
        self.changes.note(reports)
        return reports

    def surviving(self, doing: Callable[[], T]) -> T:
        """Call `doing` between two steps; again, with a new group, if a member is lost in it."""
        while True:
            try:
                return doing()
            except MemberLostError as lost:
                self.changes.recover(lost, {}, self.step + 1)

    def maintain(self) -> None:
        """Between two windows, let members join and leave."""
        self.changes.maintain(self.step, self.preempted())

    def resize(self, num_workers: int | None) -> None:
        """Wait for exactly this number of gradient workers; None leaves it as it is."""
        if num_workers is None:
            return
        self.changes.wished = num_workers
        while self.shape.gradient_workers != num_workers:
            self.maintain()
            self.wait()

    def next_gammas(self, step: int) -> tuple[float, ...]:
        """Return the gammas to invert with for `step`; none for a first-order optimizer."""
        first_shard = with_shard(self.changes.processes)[:1]
        (gammas,) = self.gather(call(first_shard, "next_gammas", [step]))
        found: tuple[float, ...] = gammas
        return found

    def averaged_parameters(self) -> Array | None:
        """Return the averaged parameters [P], None before there is an average."""
        slices = self.gather(self._call_shards("averaged_parameters"))
        if any(part is None for part in slices):
            return None
        return to_array(self.changes.shards.whole([to_tensor(part) for part in slices]))

    def server_snapshot(self) -> Callable[[], dict[str, Array]]:
        """Copy everything of the parameter server that the next step depends on.

        Returns a call that merges what the shards have copied; it can be made at any time.
        """
        parts = self.gather(self._call_shards("snapshot"))
        return partial(merge_snapshots, self.changes.shards, parts)

    def diverged_workers(self) -> list[int]:
        """Return the gradient workers whose mirrors differ from the parameters of the shards."""
        shards = self._call_shards("checksum")
        mirrors = self.call_workers("mirrored_checksums")
        sums = self.gather(shards | mirrors)
        own = tuple(sums[: len(shards)])
        return [rank for rank, mirror in enumerate(sums[len(shards) :]) if tuple(mirror) != own]

    def share_buffers(self) -> dict[str, Array]:
        """Set the buffers of all models to their mean over the workers, and return the means."""
        if not self._plan.has_buffers:
            return {}
        shared = mean_buffers(self.gather(self.call_workers("buffers")))
        self.gather(self.call_workers("set_buffers", shared))
        return shared

    def call_workers(self, method: str, *arguments: Any) -> Calls:
        """Call a method of every gradient worker, in the order of their ranks."""
        return call(with_worker(self.changes.processes), method, arguments)

    def _call_shards(self, method: str, *arguments: Any) -> Calls:
        return call(with_shard(self.changes.processes), method, arguments)

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
        return [process for process in self.changes.processes if process.member in lost]

    def wait(self) -> None:
        """Let a moment pass, and handle what has happened."""
        self._wait({})

    def forget(self, process: GroupProcess) -> None:
        """Forget all about a process that is gone, and end it if it is not."""
        self._health.forget(process.member)
        ray.kill(process.handle)

    def await_inverse_workers(self, layers: Collection[str]) -> None:
        """Wait until the inverse workers that own these layers have started.

        Raises:
            KfacDistError: they died too often, or another member did.
        """
        while self.inverse_pool.starting(layers):
            self._wait({})

    def stop_degrading(self, layers: Collection[str]) -> None:
        """Have steps wait for new inverses of these layers, whose workers are there again."""
        refs = self.inverse_pool.wait_again(layers)
        shards = with_shard(self.changes.processes)
        self.gather(dict(zip(refs, (process.member for process in shards), strict=True)))

    def averages_of(self, ranks: Collection[int], statistics_step: int) -> dict[str, Array] | None:
        """Return the averages of the inverse workers of these ranks; None if one has died.

        They contain the statistics up to `statistics_step`.
        """
        snapshots = self.inverse_pool.snapshots(statistics_step, self.group_timeout_seconds)
        asked = {ref: member for ref, member in snapshots.items() if member.rank in ranks}
        parts = self.gather_optional(asked)
        if len(parts) < len(asked):
            return None
        return {name: array for part in parts for name, array in part.items()}

    def hand_over_layers(self, setups: Mapping[int, InverseSetup], step: int) -> None:
        """Let the inverse workers own the layers of `setups` from `step` on.

        One that dies meanwhile has a successor like any other.
        """
        timeout = self.group_timeout_seconds
        self.gather_optional(self.inverse_pool.hand_over(setups, step, timeout))
        self.connect_inverse_workers()

    def _wait(self, pending: Calls) -> list[Ref]:
        """Return the calls that have ended, possibly none; handle deaths of inverse workers."""
        self._interrupts.check()
        lifelines = self.inverse_pool.lifelines()
        awaited = [*pending, *lifelines]
        if not awaited:
            time.sleep(_WAIT_SECONDS)
        ready, _ = ray.wait(awaited, num_returns=1, timeout=_WAIT_SECONDS)
        dead = finished(lifelines)
        if dead or not ready:
            self._check_node()
        self._check_health()
        if not ready:
            self.inverse_pool.poll()
        for ref in dead:
            rank = self.inverse_pool.handle_death(ref)
            self._health.forget(Member(role=INVERSE_ROLE, rank=rank))
            self._reconnect(rank)
        self._catch_up()
        return finished(pending)

    def _reconnect(self, rank: int) -> None:
        """Have the members send to the successor of an inverse worker, first what it lacks.

        This can be in the middle of a step, which may wait for that worker's inverses.
        """
        pool = self.inverse_pool
        arguments = pool.handles, pool.assignment_epochs, pool.copied_steps
        call(self.changes.processes, "reconnect", arguments)
        self._catching_up[rank] = {}

    def _catch_up(self) -> None:
        """Tell successors that have started what to expect, from what the members have sent."""
        for rank, calls in list(self._catching_up.items()):
            if rank not in self.inverse_pool.assignment:
                del self._catching_up[rank]
            elif not calls and self.inverse_pool.has_started(rank):
                asked = call(self.changes.processes, "sent_to", [rank])
                self._catching_up[rank] = asked
            elif calls and len(finished(calls)) == len(calls):
                failed = failed_among(calls)
                reports = ray.get([ref for ref in calls if ref not in failed])
                plan = self.inverse_pool.catch_up(rank, reports, self.step)
                del self._catching_up[rank]
                if plan.lost:
                    self._on_loss(rank, plan.lost)

    def keep_copies(self) -> None:
        """Keep what inverse workers have copied; members forget the statistics in it."""
        if self.inverse_pool.take_copies():
            copied = self.inverse_pool.copied_steps
            for process in self.changes.processes:
                process.handle.forget_statistics.remote(copied)

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
        self._health.ask(self._members() | self.inverse_pool.members())
        for stall in self._health.stalls():
            if stall.member.role == INVERSE_ROLE:
                self.inverse_pool.end_stalled(stall)
                self._health.forget(stall.member)
            else:
                raise self._stalled(stall)

    def _members(self) -> dict[Member, Handle]:
        return {process.member: process.handle for process in self.changes.processes}

    def _stalled(self, stall: Stall) -> MemberLostError:
        """Kill a member and return the error that names it."""
        process = next(p for p in self.changes.processes if p.member == stall.member)
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
        logs = (process.log for process in self.changes.processes if process.member == member)
        own = next(logs, member)
        return self._folder.places.log(own.role, own.rank, self._job.attempt)

    def preempted(self) -> list[Member]:
        """Return the members that have had notice that their process will be ended."""
        return self._health.preempted()

    def replace_preempted(self, rank: int, statistics_step: int) -> None:
        """Replace an inverse worker that will be ended; its averages are kept for its successor."""
        averages = self.averages_of([rank], statistics_step)
        self.inverse_pool.keep_snapshot(averages or {})
        self.inverse_pool.end_preempted(rank)

    def kill(self) -> None:
        """End all actors at once."""
        with daemons_awake():
            self.changes.end()
            self.inverse_pool.kill()


def _owners(processes: Sequence[GroupProcess], shards: ShardPlan) -> dict[str, Handle]:
    """Return the process that has the shard of each layer."""
    return {
        name: process.handle
        for process in processes
        if process.place.shard is not None
        for name in shards.layouts[process.place.shard].names
    }


def _start_timed_out(pending: Calls, seconds: float) -> TimedOutError:
    missing = ", ".join(str(member) for member in pending.values())
    free: dict[str, float] = _ray.available_resources()
    room = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU", "inverse"))
    return TimedOutError(
        f"{missing} did not start within {seconds:g} s; free in the Ray cluster: {room}"
    )
