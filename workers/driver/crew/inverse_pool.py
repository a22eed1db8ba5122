"""The inverse workers as the driver sees them: who owns which layers, who died, who replaces whom.

The death of an inverse worker does not stop the training. Its layers are *orphaned*: the parameter
server learns this at once and keeps using their last good inverses. A successor starts in the
background with the factors of the newest snapshot, and is connected between two steps. A worker
that stalls is killed, and is then dead like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import ray

from kfac_dist.errors import JobFailedError
from workers.actor import Handle, Ref, gpu_options
from workers.device import DevicePlan
from workers.driver.crew.deaths import exit_type, pid_of
from workers.driver.crew.failures import Member, failure_of, finished
from workers.driver.crew.inverse_health import InverseHealth
from workers.exchange.arrays import Array
from workers.exchange.messages import InverseSetup, InverseStatus, JobContext, RefreshRequest
from workers.inverse_worker.actor import InverseWorkerActor

ROLE = "inverse_worker"


@dataclass(frozen=True, kw_only=True)
class InverseWorkerDied:
    """The death of a worker; `num_deaths` counts all deaths of this attempt, this one included.

    `pid` is None if it died before its process was known.
    """

    rank: int
    pid: int | None
    layers: tuple[str, ...]
    exit: str
    num_deaths: int


@dataclass
class _Worker:
    """One worker; `lifeline` is a call that ends when the worker dies.

    `connected_step` is the first step in which gradient workers send to it, None before.
    """

    setup: InverseSetup
    handle: Handle
    lifeline: Ref
    first_status: Ref
    pid: int = 0
    connected_step: int | None = None
    has_stalled: bool = False


class InversePool:
    """All inverse workers of a job, started by `launch`. Not thread-safe."""

    def __init__(
        self,
        job: JobContext,
        server: Handle,
        devices: DevicePlan,
        averages: Mapping[str, Array],
        on_death: Callable[[InverseWorkerDied], None],
    ) -> None:
        self._job = job
        self._server = server
        self._devices = devices
        self._averages = dict(averages)
        self._on_death = on_death
        self._workers: dict[int, _Worker] = {}
        self._orphaned: dict[str, int] = {}  # to the rank of the worker that owned it
        self._num_deaths = 0
        self._health = InverseHealth()

    @classmethod
    def launch(
        cls,
        job: JobContext,
        server: Handle,
        devices: DevicePlan,
        setups: Sequence[InverseSetup],
        averages: Mapping[str, Array],
        on_death: Callable[[InverseWorkerDied], None],
    ) -> InversePool:
        """Start a worker for each setup, without waiting until it is there.

        Args:
            job: the job, as every actor receives it.
            server: the parameter server, to which the workers send their inverses.
            devices: where the workers compute.
            setups: the layers of each worker.
            averages: factors of all layers from a checkpoint; empty in a new run.
            on_death: called by `handle_death`.
        """
        pool = cls(job, server, devices, averages, on_death)
        pool._workers = {setup.rank: pool._start(setup) for setup in setups}
        return pool

    def _start(self, setup: InverseSetup) -> _Worker:
        names = [layer.name for layer in setup.layers]
        own = {
            key: array
            for key, array in self._averages.items()
            if any(key.startswith(f"{name}:") for name in names)
        }
        gives_way = {"CUDA_MPS_CLIENT_PRIORITY": "1"} if self._devices.inverse_shares else {}
        gpu = gpu_options(self._devices.gpus_per_inverse_worker, **gives_way)
        options = InverseWorkerActor.options(num_cpus=0, resources={"inverse": 1}, **gpu)
        handle = options.remote(self._job, setup, self._devices, self._server, own)
        return _Worker(
            setup=setup,
            handle=handle,
            lifeline=handle.lifeline.remote(),
            first_status=handle.status.remote(),
        )

    @property
    def assignment(self) -> dict[int, tuple[str, ...]]:
        """The layers of each worker, by rank."""
        return {
            rank: tuple(layer.name for layer in worker.setup.layers)
            for rank, worker in self._workers.items()
        }

    @property
    def assignment_epochs(self) -> dict[int, int]:
        """By rank, how many workers have held that rank so far, the present one included."""
        return {rank: worker.setup.assignment_epoch for rank, worker in self._workers.items()}

    @property
    def handles(self) -> dict[int, Handle]:
        """The actors, by rank."""
        return {rank: worker.handle for rank, worker in self._workers.items()}

    @property
    def orphaned(self) -> tuple[str, ...]:
        """The layers whose inverse worker died and that its successor has not refreshed yet."""
        return tuple(self._orphaned)

    @property
    def num_deaths(self) -> int:
        """The number of deaths in this attempt."""
        return self._num_deaths

    def first_statuses(self) -> dict[Ref, Member]:
        """Return a call to each worker that returns once the worker has started."""
        return {w.first_status: Member(role=ROLE, rank=rank) for rank, w in self._workers.items()}

    def lifelines(self) -> list[Ref]:
        """Return a call to each worker that ends only when the worker dies."""
        return [worker.lifeline for worker in self._workers.values()]

    def handle_death(self, lifeline: Ref) -> None:
        """Orphan the layers of the worker whose lifeline has ended, and start its successor.

        Raises:
            JobFailedError: the worker found that the job cannot continue.
        """
        rank = next(rank for rank, worker in self._workers.items() if worker.lifeline == lifeline)
        dead = self._workers[rank]
        error = failure_of(lifeline)
        if isinstance(error, JobFailedError):
            raise error  # a successor would fail in the same way
        ray.kill(dead.handle)  # its work may have failed while the process lives
        layers = self.assignment[rank]
        self._orphaned |= dict.fromkeys(layers, rank)
        self._send_orphaned()
        self._num_deaths += 1
        self._health.forget(rank)
        self._on_death(
            InverseWorkerDied(
                rank=rank,
                pid=pid_of(error, dead.pid),
                layers=layers,
                exit="stalled" if dead.has_stalled else exit_type(error),
                num_deaths=self._num_deaths,
            )
        )
        setup = replace(
            dead.setup,
            assignment_epoch=dead.setup.assignment_epoch + 1,
            applied_step=self._averages_step(layers),
        )
        self._workers[rank] = self._start(setup)

    def _averages_step(self, layers: Sequence[str]) -> int:
        steps = [int(self._averages.get(f"{name}:step", 0)) for name in layers]
        return max(steps, default=0)

    def _send_orphaned(self) -> None:
        self._server.set_orphaned.remote(self.orphaned)

    def note_started(self, step: int) -> list[int]:
        """Mark the workers that have started as connected from `step` on, and return their ranks.

        Workers marked earlier are not returned again. The caller connects the gradient workers to
        the new ones before that step.
        """
        unconnected = {
            worker.first_status: rank
            for rank, worker in self._workers.items()
            if worker.connected_step is None
        }
        ready = finished(unconnected)
        started = [unconnected[ref] for ref in ready if failure_of(ref) is None]
        for rank in started:
            worker = self._workers[rank]
            status: InverseStatus = ray.get(worker.first_status)
            worker.pid, worker.connected_step = status.pid, step
        return started

    def pid(self, rank: int) -> int:
        """Return the process id of a connected worker."""
        return self._workers[rank].pid

    def request(self, request: RefreshRequest, ranks: Sequence[int] | None = None) -> None:
        """Ask the workers of these ranks, or all workers, to refresh their layers."""
        for rank, worker in self._workers.items():
            if ranks is None or rank in ranks:
                worker.handle.refresh.remote(request)

    def note_versions(
        self, versions: Mapping[str, int], oldest_admissible: Mapping[str, int]
    ) -> list[str]:
        """Return the layers that cease to be orphaned, given the versions now in use.

        A layer is orphaned until the version in use was made by the successor and is within the
        staleness bound.
        """
        recovered = [
            layer
            for layer, rank in self._orphaned.items()
            # Only the successor can make versions from its first step on.
            if (connected := self._workers[rank].connected_step) is not None
            and versions.get(layer, 0) >= max(connected, oldest_admissible.get(layer, 1))
        ]
        for layer in recovered:
            del self._orphaned[layer]
        if recovered:
            self._send_orphaned()
        return recovered

    def poll(self) -> None:
        """Ask every connected worker for its status, and kill the workers that have stalled.

        `statuses` has the answers later. The death of a killed worker ends its lifeline.
        """
        for rank in self._health.stalled():
            worker = self._workers[rank]
            if not worker.has_stalled:
                worker.has_stalled = True
                ray.kill(worker.handle)
        connected = {
            rank: worker.handle
            for rank, worker in self._workers.items()
            if worker.connected_step is not None
        }
        self._health.ask(connected)

    def statuses(self) -> dict[int, InverseStatus]:
        """Return the newest answer of each worker."""
        return self._health.statuses()

    @property
    def num_starting(self) -> int:
        """The number of workers not connected yet: in a running job, successors of dead ones."""
        return sum(worker.connected_step is None for worker in self._workers.values())

    def snapshots(self, step: int, timeout_seconds: float) -> dict[Ref, Member]:
        """Ask the connected workers for their averages, which must include statistics of `step`."""
        return {
            worker.handle.snapshot.remote(step, timeout_seconds): Member(role=ROLE, rank=rank)
            for rank, worker in self._workers.items()
            if worker.connected_step is not None and worker.connected_step <= step
        }

    def keep_snapshot(self, averages: Mapping[str, Array]) -> dict[str, Array]:
        """Keep averages for successors; return the newest that are known of every layer."""
        self._averages |= averages
        return dict(self._averages)

    def kill(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            ray.kill(worker.handle)
