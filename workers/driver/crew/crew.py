"""All actors of a job as the driver holds them, and the one way to wait for their calls.

A *call* is a method of an actor that has been invoked and has not been waited for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from kfac_dist.errors import TimedOutError
from kfac_dist.runs import RunFolder
from workers.actor import Handle, Ref
from workers.cluster.daemons import DaemonWatch, daemons_awake
from workers.cluster.lost import lost_node_error, stopped_daemon_error
from workers.device import DevicePlan
from workers.driver.crew.deaths import InverseWorkerDied
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
from workers.driver.crew.inverse_pool import InversePool
from workers.exchange.arrays import Array
from workers.exchange.messages import InverseSetup, JobContext, Rendezvous
from workers.exchange.process_group import PeerLostError
from workers.gradient_worker.actor import GradientWorkerActor
from workers.gradient_worker.buffers import mean_buffers
from workers.interrupts import Interrupts
from workers.parameter_server.actor import ParameterServerActor, ServerReady

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

    `host` is the address that all members share, None where each node has its own.
    `server_snapshot`, `averages` and `buffers` come from a checkpoint, if the run resumes.
    `has_buffers`: the model has buffers.
    """

    devices: DevicePlan
    host: str | None
    setups: Sequence[InverseSetup]
    server_snapshot: Mapping[str, Array] | None
    averages: Mapping[str, Array]
    buffers: Mapping[str, Array]
    has_buffers: bool


class Crew:
    """The actors of a job, started by `launch`; `step` is the step that errors name."""

    def __init__(
        self,
        job: JobContext,
        folder: RunFolder,
        plan: CrewPlan,
        interrupts: Interrupts,
        *,
        server: Handle,
        gradient_workers: Sequence[Handle],
        inverse_pool: InversePool,
    ) -> None:
        self.step = 0
        self.server = server
        self.gradient_workers = gradient_workers
        self.inverse_pool = inverse_pool
        self._job = job
        self._folder = folder
        self._plan = plan
        self._interrupts = interrupts
        self._pids: dict[tuple[str, int], int] = {}
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
        num_gpus, threads = plan.devices.gpus_per_member, job.spec.workers.threads or 1
        server = ParameterServerActor.options(num_gpus=num_gpus).remote(
            job, plan.devices, plan.host, patience_seconds(job.spec.faults)
        )
        worker = GradientWorkerActor.options(num_cpus=threads, num_gpus=num_gpus)
        return cls(
            job,
            folder,
            plan,
            interrupts,
            server=server,
            gradient_workers=[
                worker.remote(job, rank, plan.devices, plan.host, threads)
                for rank in range(job.spec.workers.gradient)
            ],
            inverse_pool=InversePool.launch(job, server, plan.setups, plan.averages, on_death),
        )

    @property
    def group_timeout_seconds(self) -> float:
        """How long a wait for a member of the group, or for an inverse worker, may take."""
        return patience_seconds(self._job.spec.faults)

    def build(self) -> ServerReady:
        """Have all actors load what they need, then form the process group.

        Raises:
            KfacDistError: a member raised an error, or died.
            TimedOutError: an actor did not start in time.
        """
        built = self.call_server("build", self._plan.server_snapshot)
        calls = self.call_workers("build", self._plan.buffers)
        started = self.inverse_pool.first_statuses()
        ready: ServerReady
        ready, *rest = self.gather(built | calls | started, deadline_seconds=_START_SECONDS)
        self._note_pids(ready, rest[: len(calls)])
        self.inverse_pool.note_started(step=0)
        meet = Rendezvous(
            host=ready.host,
            port=ready.port,
            epoch=self._job.attempt,
            num_gradient_workers=len(self.gradient_workers),
            timeout_seconds=self.group_timeout_seconds,
        )
        self.gather(self.call_server("join", meet) | self.call_workers("join", meet))
        self.connect_inverse_workers()
        return ready

    def _note_pids(self, server: ServerReady, workers: Sequence[int]) -> None:
        self._pids = {(WORKER_ROLE, rank): pid for rank, pid in enumerate(workers)}
        self._pids[SERVER_ROLE, 0] = server.pid

    def connect_inverse_workers(self) -> None:
        """Tell the gradient workers to which inverse worker they send which layer's statistics."""
        pool = self.inverse_pool
        if pool.assignment:
            self.gather(
                self.call_workers("connect", pool.handles, pool.assignment, pool.assignment_epochs)
            )

    def share_buffers(self) -> dict[str, Array]:
        """Set the buffers of all models to their mean over the workers, and return the means."""
        if not self._plan.has_buffers:
            return {}
        shared = mean_buffers(self.gather(self.call_workers("buffers")))
        self.gather(self.call_workers("set_buffers", shared))
        return shared

    def call_workers(self, method: str, *arguments: Any) -> Calls:
        """Call a method of every gradient worker."""
        return {
            getattr(worker, method).remote(*arguments): self._member(WORKER_ROLE, rank)
            for rank, worker in enumerate(self.gradient_workers)
        }

    def call_server(self, method: str, *arguments: Any) -> Calls:
        """Call a method of the parameter server."""
        return {getattr(self.server, method).remote(*arguments): self._member(SERVER_ROLE, 0)}

    def _member(self, role: str, rank: int) -> Member:
        return Member(role=role, rank=rank, pid=self._pids.get((role, rank), 0))

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
        ref = self.inverse_pool.wait_again(layers)
        self.gather({ref: self._member(SERVER_ROLE, 0)})

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
        workers = {
            self._member(WORKER_ROLE, rank): worker
            for rank, worker in enumerate(self.gradient_workers)
        }
        return {self._member(SERVER_ROLE, 0): self.server} | workers

    def _stalled(self, stall: Stall) -> Exception:
        """Kill a member and return the error that names it."""
        member = self._member(stall.member.role, stall.member.rank)
        ray.kill(self._members()[member])
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
            for actor in (self.server, *self.gradient_workers):
                ray.kill(actor)
            self.inverse_pool.kill()


def _start_timed_out(pending: Calls, seconds: float) -> TimedOutError:
    missing = ", ".join(str(member) for member in pending.values())
    free: dict[str, float] = _ray.available_resources()
    room = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU", "inverse"))
    return TimedOutError(
        f"{missing} did not start within {seconds:g} s; free in the Ray cluster: {room}"
    )
