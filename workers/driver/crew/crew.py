"""All actors of a job as the driver holds them, and the one way to wait for them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from kfac_dist.errors import TimedOutError
from kfac_dist.runs import RunFolder
from kfac_dist.runs.logs import log_tail
from workers.actor import Handle, Ref
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
SERVER_ROLE = "parameter_server"
WORKER_ROLE = "gradient_worker"
_WAIT_SECONDS = 0.25  # how soon an interrupt is seen
_ray: Any = ray  # its stubs leave much untyped
_START_SECONDS = 300.0  # a cluster without room lets an actor wait forever, without an error


@dataclass(frozen=True, kw_only=True)
class CrewPlan:
    """Who is started, and from what.

    `host` is the address all members share, None where each node has its own; the timeout is that
    of the process group. `server_snapshot`, `averages` and `buffers` come from a checkpoint, if
    there is one; `has_buffers` tells whether the model has any.
    """

    devices: DevicePlan
    host: str | None
    group_timeout_seconds: float
    setups: Sequence[InverseSetup]
    server_snapshot: Mapping[str, Array] | None
    averages: Mapping[str, Array]
    buffers: Mapping[str, Array]
    has_buffers: bool


class Crew:
    """The actors of a job; `step` is the step that errors are reported for."""

    def __init__(
        self,
        job: JobContext,
        folder: RunFolder,
        plan: CrewPlan,
        on_death: Callable[[InverseWorkerDied], None],
        interrupts: Interrupts,
    ) -> None:
        self.step = 0
        self._interrupts = interrupts
        self._job = job
        self._folder = folder
        self._plan = plan
        self._pids: dict[tuple[str, int], int] = {}
        self.server: Handle = ParameterServerActor.options(
            num_gpus=plan.devices.gpus_per_member
        ).remote(job, plan.devices, plan.host, plan.group_timeout_seconds)
        threads = job.spec.workers.threads or 1
        self.gradient_workers: list[Handle] = [
            GradientWorkerActor.options(
                num_cpus=threads, num_gpus=plan.devices.gpus_per_member
            ).remote(job, rank, plan.devices, plan.host, threads)
            for rank in range(job.spec.workers.gradient)
        ]
        self.inverse_pool = InversePool(job, self.server, plan.setups, plan.averages, on_death)

    @property
    def group_timeout_seconds(self) -> float:
        """How long a member of the group, or an inverse worker, is waited for."""
        return self._plan.group_timeout_seconds

    def build(self) -> ServerReady:
        """Let everybody load what they need, and form the process group.

        Raises:
            KfacDistError: what a member raised, or that it died.
        """
        built = self.call_server("build", self._plan.server_snapshot)
        calls = self.call_workers("build", self._plan.buffers)
        started = self.inverse_pool.first_statuses()
        ready: ServerReady
        ready, *rest = self.gather(built | calls | started, deadline_seconds=_START_SECONDS)
        self._note_pids(ready, rest[: len(calls)])
        self.inverse_pool.take_over(step=0)
        meet = Rendezvous(
            host=ready.host,
            port=ready.port,
            epoch=self._job.attempt,
            num_gradient_workers=len(self.gradient_workers),
            timeout_seconds=self._plan.group_timeout_seconds,
        )
        self.gather(self.call_server("join", meet) | self.call_workers("join", meet))
        self.connect()
        return ready

    def _note_pids(self, server: ServerReady, workers: Sequence[int]) -> None:
        self._pids = {(WORKER_ROLE, rank): pid for rank, pid in enumerate(workers)}
        self._pids[SERVER_ROLE, 0] = server.pid

    def connect(self) -> None:
        """Tell the gradient workers who the inverse workers are now."""
        pool = self.inverse_pool
        if pool.assignment:
            self.gather(
                self.call_workers("connect", pool.handles, pool.assignment, pool.assignment_epochs)
            )

    def share_buffers(self) -> dict[str, Array]:
        """Give all gradient workers the means of their models' buffers, and return these."""
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
        """Return the results of `calls` in order, once all are there.

        An inverse worker may die meanwhile: that is dealt with and does not end the wait.

        Raises:
            KfacDistError: the cause of the first failure among `calls`.
            TimedOutError: some were not there at the deadline.
        """
        pending = dict(calls)
        deadline = time.monotonic() + deadline_seconds
        while pending:
            if time.monotonic() > deadline:
                raise _not_started(pending, deadline_seconds)
            ready = {ref: pending.pop(ref) for ref in self._wait(pending)}
            if failed := failed_among(ready):
                raise self._error(failed, pending)
        return list(ray.get(list(calls)))

    def gather_optional(self, calls: Calls) -> list[Any]:
        """Wait for all `calls` and return the results of those that returned."""
        pending = dict(calls)
        while pending:
            for ref in self._wait(pending):
                del pending[ref]
        failed = failed_among(calls)
        return list(ray.get([ref for ref in calls if ref not in failed]))

    def _wait(self, pending: Calls) -> list[Ref]:
        """Return the calls that have ended, after a while none; deal with deaths meanwhile."""
        self._interrupts.check()
        watched = self.inverse_pool.watched()
        ready, _ = ray.wait([*pending, *watched], num_returns=1, timeout=_WAIT_SECONDS)
        if not ready:
            self.inverse_pool.poll()
        for ref in finished(watched):
            self.inverse_pool.notice(ref)
        return finished(pending)

    def _error(self, failed: Calls, pending: Calls) -> Exception:
        member, error = first_cause(failed, pending)
        path = self._folder.places.log(member.role, member.rank, self._job.attempt)
        return job_error(member, error, step=self.step, log_tail=log_tail(path))

    def kill(self) -> None:
        """End all actors at once."""
        for actor in (self.server, *self.gradient_workers):
            ray.kill(actor)
        self.inverse_pool.kill()


def _not_started(pending: Calls, seconds: float) -> TimedOutError:
    missing = ", ".join(str(member) for member in pending.values())
    free: dict[str, float] = _ray.available_resources()
    room = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU", "inverse"))
    return TimedOutError(
        f"{missing} did not start within {seconds:g} s; free in the Ray cluster: {room}"
    )
