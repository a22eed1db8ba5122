"""All actors of a job as the driver holds them, and the one way to wait for their calls.

A *call* is a method of an actor that has been invoked and has not been waited for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from kfac_dist.errors import TimedOutError
from kfac_dist.runs import RunFolder
from workers.actor import Handle, Ref
from workers.cluster.lost import lost_node_error
from workers.cluster.ray_internals import dead_daemons
from workers.device import DevicePlan
from workers.driver.crew.failures import Member, failed_among, finished, first_cause, job_error
from workers.driver.crew.inverse_pool import InversePool, InverseWorkerDied
from workers.exchange.arrays import Array
from workers.exchange.messages import InverseSetup, JobContext, Rendezvous
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
    `group_timeout_seconds` is for the process group. `server_snapshot`, `averages` and `buffers`
    come from a checkpoint, if the run resumes. `has_buffers`: the model has buffers.
    `catch_up_logs` brings what members on other nodes have written into the run folder.
    """

    devices: DevicePlan
    host: str | None
    group_timeout_seconds: float
    setups: Sequence[InverseSetup]
    server_snapshot: Mapping[str, Array] | None
    averages: Mapping[str, Array]
    buffers: Mapping[str, Array]
    has_buffers: bool
    catch_up_logs: Callable[[], None]


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
            job, plan.devices, plan.host, plan.group_timeout_seconds
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
        return self._plan.group_timeout_seconds

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
            timeout_seconds=self._plan.group_timeout_seconds,
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
            KfacDistError: the cause of the first failure among `calls`.
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

    def _wait(self, pending: Calls) -> list[Ref]:
        """Return the calls that have ended, possibly none; handle deaths of inverse workers."""
        self._interrupts.check()
        lifelines = self.inverse_pool.lifelines()
        ready, _ = ray.wait([*pending, *lifelines], num_returns=1, timeout=_WAIT_SECONDS)
        dead = finished(lifelines)
        if dead or not ready:
            self._check_node()
        if not ready:
            self.inverse_pool.poll()
        for ref in dead:
            self.inverse_pool.handle_death(ref)
        return finished(pending)

    def _check_node(self) -> None:
        if dead := dead_daemons():
            raise lost_node_error(dead[0], self.step)

    def _error(self, failed: Calls, pending: Calls) -> Exception:
        self._check_node()  # if the node is lost, who died on it says nothing
        member, error = first_cause(failed, pending)
        self._plan.catch_up_logs()
        path = self._folder.places.log(member.role, member.rank, self._job.attempt)
        return job_error(member, error, step=self.step, log=path)

    def kill(self) -> None:
        """End all actors at once."""
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
