"""All actors of a job as the driver holds them, and the one way to wait for their calls.

A *call* is a method of an actor that has been invoked and has not been waited for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from kfac_dist.errors import TimedOutError
from kfac_dist.runs import RunFolder
from workers.actor import Handle, Ref, node_address
from workers.cluster.daemons import DaemonWatch, daemons_awake
from workers.cluster.lost import lost_node_error, stopped_daemon_error
from workers.device import DevicePlan
from workers.driver.crew.failures import (
    Member,
    failed_among,
    finished,
    first_cause,
    job_error,
    stall_error,
)
from workers.driver.crew.health import Health, Stall, patience_seconds
from workers.driver.crew.inverse_pool import ROLE as INVERSE_ROLE
from workers.driver.crew.inverse_pool import InversePool, InverseWorkerDied
from workers.exchange.arrays import Array, to_array, to_tensor
from workers.exchange.messages import (
    InverseSetup,
    JobContext,
    Rendezvous,
    ServerReport,
    StepOrder,
    WorkerReport,
    merge_reports,
)
from workers.exchange.process_group import PeerLostError, host_store
from workers.exchange.shard_plan import (
    ShardPlan,
    is_colocated,
    merge_snapshots,
    split_snapshot,
)
from workers.gradient_worker.buffers import mean_buffers
from workers.interrupts import Interrupts
from workers.member.actor import (
    GradientWorkerActor,
    MemberPlace,
    MemberReady,
    ParameterServerActor,
)

Calls = dict[Ref, Member]
"""Open calls, and the member that each was made to."""

SERVER_ROLE = "parameter_server"
WORKER_ROLE = "gradient_worker"
_WAIT_SECONDS = 0.25  # how soon an interrupt is seen
_START_SECONDS = 300.0  # on a cluster without room an actor waits forever, without an error

# Ray's stubs leave much untyped.
_ray: Any = ray


@dataclass(frozen=True, kw_only=True)
class CrewPlan:
    """Which actors to start, and the state they start from.

    `host` is the address that all members share, None where each node has its own. `shards` says
    how the parameters are cut, and `layers` are all layers in the order of the model.
    `server_snapshot`, `averages` and `buffers` come from a checkpoint, if the run resumes.
    `has_buffers`: the model has buffers.
    """

    devices: DevicePlan
    host: str | None
    shards: ShardPlan
    layers: Sequence[str]
    setups: Sequence[InverseSetup]
    server_snapshot: Mapping[str, Array] | None
    averages: Mapping[str, Array]
    buffers: Mapping[str, Array]
    has_buffers: bool


@dataclass(frozen=True, kw_only=True)
class StepReports:
    """What all members report of one step."""

    server: ServerReport
    workers: Sequence[WorkerReport]


@dataclass(kw_only=True)
class _Process:
    """A process of the group; `member` is how people know it."""

    place: MemberPlace
    handle: Handle
    member: Member


class Crew:
    """The actors of a job, started by `launch`; `step` is the step that errors name."""

    def __init__(
        self,
        job: JobContext,
        folder: RunFolder,
        plan: CrewPlan,
        interrupts: Interrupts,
        *,
        processes: Sequence[_Process],
        inverse_pool: InversePool,
    ) -> None:
        self.step = 0
        self.inverse_pool = inverse_pool
        self._processes = list(processes)
        self._job = job
        self._folder = folder
        self._plan = plan
        self._interrupts = interrupts
        self._store: object  # where the members of a group meet; set by `build`
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
    ) -> Crew:
        """Start all actors, without waiting until they are there; `build` comes next.

        Args:
            job: the job, as every actor receives it.
            folder: the run folder, where the logs of failed members are found.
            plan: which actors to start, and the state they start from.
            interrupts: checked in every wait.
            on_death: called in the middle of a wait for each inverse worker that dies; what it
                raises ends the job.
        """
        processes = [_start(job, plan, place) for place in _places(job, plan)]
        owners = {
            name: process.handle
            for process in processes
            if process.place.shard is not None
            for name in plan.shards.layouts[process.place.shard].names
        }
        return cls(
            job,
            folder,
            plan,
            interrupts,
            processes=processes,
            inverse_pool=InversePool.launch(job, owners, plan.setups, plan.averages, on_death),
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
        calls = {
            process.handle.build.remote(
                self._plan.buffers, self._snapshot_of(process.place)
            ): process.member
            for process in self._processes
        }
        started = self.inverse_pool.first_statuses()
        ready = self.gather(calls | started, deadline_seconds=_START_SECONDS)[: len(calls)]
        for process, answer in zip(self._processes, ready, strict=True):
            process.member = replace(process.member, pid=answer.pid)
        self.inverse_pool.note_started(step=0)
        self._form_group(epoch=self._job.attempt)
        self.connect_inverse_workers()
        first: MemberReady = next(
            answer
            for process, answer in zip(self._processes, ready, strict=True)
            if process.place.shard == 0
        )
        return first

    def _snapshot_of(self, place: MemberPlace) -> Mapping[str, Array] | None:
        """Return a shard's part of the checkpoint from which the run resumes."""
        snapshot = self._plan.server_snapshot
        if snapshot is None or place.shard is None:
            return None
        return split_snapshot(self._plan.shards, snapshot, place.shard)

    def _form_group(self, epoch: int) -> None:
        host = self._plan.host or node_address()
        store = host_store(host, self.group_timeout_seconds)
        self._store = store
        meet = Rendezvous(
            host=host,
            port=store.port,
            epoch=epoch,
            num_gradient_workers=self._job.spec.workers.gradient,
            num_shards=len(self._plan.shards),
            timeout_seconds=self.group_timeout_seconds,
        )
        self.gather(self._call_all("join", meet))

    def connect_inverse_workers(self) -> None:
        """Tell all members to which inverse worker they send what."""
        pool = self.inverse_pool
        if pool.assignment:
            self.gather(
                self._call_all("connect", pool.handles, pool.assignment, pool.assignment_epochs)
            )

    def run(self, orders: Sequence[StepOrder]) -> list[StepReports]:
        """Have all members do the steps of a window, and return their reports by step."""
        reports = self.gather(self._call_all("run", orders))
        by_place = [
            (process.place, own) for process, own in zip(self._processes, reports, strict=True)
        ]
        workers = sorted((p.worker, own) for p, own in by_place if p.worker is not None)
        shards = sorted((p.shard, own) for p, own in by_place if p.shard is not None)
        return [
            StepReports(
                server=merge_reports([own[k].shard for _, own in shards], self._plan.layers),
                workers=[own[k].worker for _, own in workers],
            )
            for k in range(len(orders))
        ]

    def next_gammas(self, step: int) -> tuple[float, ...]:
        """Return the gammas to invert with for `step`; none for a first-order optimizer."""
        first, *_ = self.gather(self._call_shards("next_gammas", step, only_first=True))
        gammas: tuple[float, ...] = first
        return gammas

    def averaged_parameters(self) -> Array | None:
        """Return the averaged parameters [P], None before there is an average."""
        slices = self.gather(self._call_shards("averaged_parameters"))
        if any(part is None for part in slices):
            return None
        return to_array(self._plan.shards.whole([to_tensor(part) for part in slices]))

    def server_snapshot(self) -> dict[str, Array]:
        """Return everything of the parameter server that the next step depends on."""
        return merge_snapshots(self._plan.shards, self.gather(self._call_shards("snapshot")))

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
        workers = [process for process in self._processes if process.place.worker is not None]
        return _call(sorted(workers, key=lambda p: p.place.worker or 0), method, arguments)

    def _call_shards(self, method: str, *arguments: Any, only_first: bool = False) -> Calls:
        shards = [process for process in self._processes if process.place.shard is not None]
        shards.sort(key=lambda p: p.place.shard or 0)
        return _call(shards[:1] if only_first else shards, method, arguments)

    def _call_all(self, method: str, *arguments: Any) -> Calls:
        return _call(self._processes, method, arguments)

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
        shards = [process.member for process in self._processes if process.place.shard is not None]
        self.gather(dict(zip(refs, shards, strict=True)))

    def _wait(self, pending: Calls) -> list[Ref]:
        """Return the calls that have ended, possibly none; handle deaths of inverse workers."""
        self._interrupts.check()
        lifelines = self.inverse_pool.lifelines()
        ready, _ = ray.wait([*pending, *lifelines], num_returns=1, timeout=_WAIT_SECONDS)
        dead = finished(lifelines)
        if dead or not ready:
            self._check_node()
        self._check_health()
        if not ready:
            self.inverse_pool.poll()
        for ref in dead:
            rank = self.inverse_pool.handle_death(ref)
            self._health.forget(Member(role=INVERSE_ROLE, rank=rank))
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
        self._health.ask(self._members() | self.inverse_pool.members())
        for stall in self._health.stalls():
            if stall.member.role == INVERSE_ROLE:
                self.inverse_pool.end_stalled(stall)
                self._health.forget(stall.member)
            else:
                raise self._stalled(stall)

    def _members(self) -> dict[Member, Handle]:
        return {process.member: process.handle for process in self._processes}

    def _stalled(self, stall: Stall) -> Exception:
        """Kill a member and return the error that names it."""
        process = next(p for p in self._processes if p.member == stall.member)
        member = process.member
        ray.kill(process.handle)
        log = self._folder.places.log(member.role, member.rank, self._job.attempt)
        return stall_error(member, stall.why, step=self.step, log=log)

    def _error(self, failed: Calls, pending: Calls) -> Exception:
        self._check_node()  # if the node is lost, who died on it says nothing
        member, error = first_cause(failed, pending)
        suspect = self._health.suspect() if isinstance(error, PeerLostError) else None
        if suspect is not None and suspect.member.role != INVERSE_ROLE:
            return self._stalled(suspect)
        path = self._folder.places.log(member.role, member.rank, self._job.attempt)
        return job_error(member, error, step=self.step, log=path)

    def kill(self) -> None:
        """End all actors at once."""
        with daemons_awake():
            for process in self._processes:
                ray.kill(process.handle)
            self.inverse_pool.kill()


def _places(job: JobContext, plan: CrewPlan) -> list[MemberPlace]:
    """Return the roles of each process: the shards first, then the gradient workers."""
    num_shards, num_workers = len(plan.shards), job.spec.workers.gradient
    shared = is_colocated(job.spec.workers)
    alone = [
        MemberPlace(worker=None, shard=shard, num_shards=num_shards)
        for shard in range(0 if shared else num_shards)
    ]
    workers = [
        MemberPlace(
            worker=rank,
            shard=rank if shared and rank < num_shards else None,
            num_shards=num_shards,
        )
        for rank in range(num_workers)
    ]
    return alone + workers


def _start(job: JobContext, plan: CrewPlan, place: MemberPlace) -> _Process:
    threads = job.spec.workers.threads or 1
    if place.worker is None:
        actor, threads = ParameterServerActor, 1
        options = {"num_gpus": plan.devices.gpus_per_member}
        member = Member(role=SERVER_ROLE, rank=place.shard or 0)
    else:
        actor = GradientWorkerActor
        options = {"num_gpus": plan.devices.gpus_per_member, "num_cpus": threads}
        member = Member(role=WORKER_ROLE, rank=place.worker)
    patience = patience_seconds(job.spec.faults)
    handle = actor.options(**options).remote(job, place, plan.devices, plan.host, threads, patience)
    return _Process(place=place, handle=handle, member=member)


def _call(processes: Sequence[_Process], method: str, arguments: Sequence[Any]) -> Calls:
    return {
        getattr(process.handle, method).remote(*arguments): process.member for process in processes
    }


def _start_timed_out(pending: Calls, seconds: float) -> TimedOutError:
    missing = ", ".join(str(member) for member in pending.values())
    free: dict[str, float] = _ray.available_resources()
    room = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU", "inverse"))
    return TimedOutError(
        f"{missing} did not start within {seconds:g} s; free in the Ray cluster: {room}"
    )
