"""All actors of a job as the driver holds them: the process group, and the inverse workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import ray

from kfac_dist.runs import RunFolder, WorkerCounts
from workers.actor import Handle, Ref, node_address
from workers.cluster.daemons import daemons_awake
from workers.cluster.interrupts import Interrupts
from workers.driver.crew.deaths import InverseWorkerDied
from workers.driver.crew.failures import (
    Member,
    MemberLostError,
)
from workers.driver.crew.group_changes import GroupChanges
from workers.driver.crew.healing import StepReports
from workers.driver.crew.health import patience_seconds
from workers.driver.crew.inverse.inverse_pool import InversePool
from workers.driver.crew.inverse.successors import OnLoss, Successors
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
from workers.driver.crew.waiter import Waiter
from workers.exchange.arrays import Array, to_array, to_tensor
from workers.exchange.messages import (
    JobContext,
    MemberPlace,
    Rendezvous,
    StepOrder,
    merge_reports,
)
from workers.exchange.process_group import host_store
from workers.exchange.shard_plan import ShardPlan, merge_snapshots, split_snapshot
from workers.gradient_worker.buffers import mean_buffers
from workers.member.actor import MemberReady
from workers.planning import step_schedule

T = TypeVar("T")

_START_SECONDS = 300.0  # on a cluster without room an actor waits forever, without an error


class Crew:
    """The actors of a job, started by `launch`."""

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
        self.inverse_pool = inverse_pool
        self.changes = GroupChanges(job, plan, processes, self, observer)
        self._job = job
        self._plan = plan
        self._epoch = 0
        self._store: object  # where the members of a group meet
        members = self._members
        self._successors = Successors(step_schedule(job.spec), inverse_pool, members, on_loss)
        self._waiter = Waiter(
            job, folder, plan, interrupts, inverse_pool, self._successors, members
        )

    def _members(self) -> Sequence[GroupProcess]:
        return self.changes.processes

    @property
    def step(self) -> int:
        """The last step that is done, which errors name."""
        return self._waiter.step

    @step.setter
    def step(self, step: int) -> None:
        self._waiter.step = step

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
        """Wait for all `calls` and return their results in order; see `Waiter`."""
        return self._waiter.gather(calls, deadline_seconds)

    def gather_optional(self, calls: Calls) -> list[Any]:
        """Wait for all `calls` and return the results of those that did not fail."""
        return self._waiter.gather_optional(calls)

    def settle(self, calls: Calls) -> list[GroupProcess]:
        """Wait until all calls have ended, however they end; return the processes that died."""
        return self._waiter.settle(calls)

    def wait(self) -> None:
        """Let a moment pass, and handle what has happened."""
        self._waiter.wait()

    def forget(self, process: GroupProcess) -> None:
        """Forget all about a process that is gone, and end it if it is not."""
        self._waiter.forget(process)

    def preempted(self) -> list[Member]:
        """Return the members that have had notice that their process will be ended."""
        return self._waiter.preempted()

    def keep_copies(self) -> None:
        """Keep what inverse workers have copied; members forget the statistics in it."""
        self._successors.keep_copies()

    def await_inverse_workers(self, layers: Collection[str]) -> None:
        """Wait until the inverse workers that own these layers have started.

        Raises:
            KfacDistError: they died too often, or another member did.
        """
        while self.inverse_pool.starting(layers):
            self.wait()

    def stop_degrading(self, layers: Collection[str]) -> None:
        """Have steps wait for new inverses of these layers, whose workers are there again."""
        refs = self.inverse_pool.orphans.wait_again(layers)
        shards = with_shard(self.changes.processes)
        self.gather(dict(zip(refs, (process.member for process in shards), strict=True)))

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
