"""The inverse workers as the driver sees them: who owns which layers, who died, who comes next.

A dead one does not stop the training: its layers are orphaned, which the parameter server is told
at once, and keep their last good inverses. A successor starts in the background, with the factors
of the newest snapshot, and takes over between two steps. One that stalls is killed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import ray

from workers.actor import Handle, Ref
from workers.driver.crew.failures import Member, failure_of, finished
from workers.driver.crew.inverse_health import InverseHealth
from workers.exchange.arrays import Array
from workers.exchange.messages import InverseSetup, InverseStatus, JobContext, RefreshRequest
from workers.inverse_worker.actor import InverseWorkerActor

ROLE = "inverse_worker"
_EXIT_TYPE = re.compile(r"Worker exit type: (\S+)")


@dataclass(frozen=True, kw_only=True)
class InverseWorkerDied:
    """What is known of a death; `num_deaths` counts all of them in this attempt."""

    rank: int
    pid: int
    layers: tuple[str, ...]
    exit: str
    num_deaths: int


@dataclass
class _Worker:
    setup: InverseSetup
    handle: Handle
    lifeline: Ref
    first_status: Ref
    pid: int = 0
    connected_step: int | None = None
    has_stalled: bool = False


class InversePool:
    """All inverse workers of a job; used by the driver's one thread."""

    def __init__(
        self,
        job: JobContext,
        server: Handle,
        setups: Sequence[InverseSetup],
        averages: Mapping[str, Array],
        on_death: Callable[[InverseWorkerDied], None],
    ) -> None:
        self._job = job
        self._server = server
        self._averages = dict(averages)
        self._on_death = on_death
        self._workers = {setup.rank: self._start(setup) for setup in setups}
        self._orphaned: dict[str, int] = {}
        self._num_deaths = 0
        self._health = InverseHealth()

    def _start(self, setup: InverseSetup) -> _Worker:
        names = [layer.name for layer in setup.layers]
        own = {
            key: array
            for key, array in self._averages.items()
            if any(key.startswith(f"{name}:") for name in names)
        }
        options = InverseWorkerActor.options(num_cpus=0, resources={"inverse": 1})
        handle = options.remote(self._job, setup, self._server, own)
        return _Worker(
            setup=setup,
            handle=handle,
            lifeline=handle.lifeline.remote(),
            first_status=handle.status.remote(),
        )

    @property
    def assignment(self) -> dict[int, tuple[str, ...]]:
        """Layers by worker."""
        return {
            rank: tuple(layer.name for layer in worker.setup.layers)
            for rank, worker in self._workers.items()
        }

    @property
    def assignment_epochs(self) -> dict[int, int]:
        """For each worker, how many have had its place, itself included."""
        return {rank: worker.setup.assignment_epoch for rank, worker in self._workers.items()}

    @property
    def handles(self) -> dict[int, Handle]:
        """The actors."""
        return {rank: worker.handle for rank, worker in self._workers.items()}

    @property
    def orphaned(self) -> tuple[str, ...]:
        """Layers whose inverse worker died and that no successor has refreshed yet."""
        return tuple(self._orphaned)

    @property
    def num_deaths(self) -> int:
        """Deaths in this attempt."""
        return self._num_deaths

    def first_statuses(self) -> dict[Ref, Member]:
        """Return the calls that answer when each worker has started."""
        return {w.first_status: Member(role=ROLE, rank=rank) for rank, w in self._workers.items()}

    def watched(self) -> list[Ref]:
        """Return the calls that end when a worker dies; to be waited for beside all others."""
        return [worker.lifeline for worker in self._workers.values()]

    def notice(self, ref: Ref) -> None:
        """Take in that one of `watched` has ended: orphan the layers and start a successor."""
        rank = next(rank for rank, worker in self._workers.items() if worker.lifeline == ref)
        dead = self._workers[rank]
        error = failure_of(ref)
        ray.kill(dead.handle)
        layers = self.assignment[rank]
        self._orphaned |= dict.fromkeys(layers, rank)
        self._tell_server()
        self._num_deaths += 1
        self._health.forget(rank)
        self._on_death(
            InverseWorkerDied(
                rank=rank,
                pid=dead.pid,
                layers=layers,
                exit="stalled" if dead.has_stalled else _describe_exit(error),
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

    def _tell_server(self) -> None:
        self._server.set_orphaned.remote(self.orphaned)

    def take_over(self, step: int) -> list[int]:
        """Return the workers that have started and are not connected yet; they are from `step` on.

        The caller connects the gradient workers to them before that step.
        """
        unconnected = {
            worker.first_status: rank
            for rank, worker in self._workers.items()
            if worker.connected_step is None
        }
        ready = finished(unconnected)
        joined = [unconnected[ref] for ref in ready if failure_of(ref) is None]
        for rank in joined:
            worker = self._workers[rank]
            status: InverseStatus = ray.get(worker.first_status)
            worker.pid, worker.connected_step = status.pid, step
        return joined

    def pid(self, rank: int) -> int:
        """Return the process id of a connected worker."""
        return self._workers[rank].pid

    def request(self, request: RefreshRequest, ranks: Sequence[int] | None = None) -> None:
        """Ask these workers, or all, to refresh their layers."""
        for rank, worker in self._workers.items():
            if ranks is None or rank in ranks:
                worker.handle.refresh.remote(request)

    def note_versions(
        self, versions: Mapping[str, int], oldest_admissible: Mapping[str, int]
    ) -> list[str]:
        """Return the orphaned layers that are not any more.

        A successor has refreshed them and they are within the staleness bound.
        """
        back = [
            layer
            for layer, rank in self._orphaned.items()
            if (connected := self._workers[rank].connected_step) is not None
            and versions.get(layer, 0) >= max(connected, oldest_admissible.get(layer, 1))
        ]
        for layer in back:
            del self._orphaned[layer]
        if back:
            self._tell_server()
        return back

    def poll(self) -> None:
        """Ask every worker for its status, and kill those that have not answered for too long.

        `statuses` has the answers later; deaths are noticed as all others are.
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
        """Number of workers not connected yet: in a running job, successors of dead ones."""
        return sum(worker.connected_step is None for worker in self._workers.values())

    def snapshots(self, step: int, timeout_seconds: float) -> dict[Ref, Member]:
        """Ask the connected workers for their averages, with the statistics of `step` in them."""
        return {
            worker.handle.snapshot.remote(step, timeout_seconds): Member(role=ROLE, rank=rank)
            for rank, worker in self._workers.items()
            if worker.connected_step is not None and worker.connected_step <= step
        }

    def keep_snapshot(self, averages: Mapping[str, Array]) -> dict[str, Array]:
        """Remember averages for successors; return the newest known of every layer."""
        self._averages |= averages
        return dict(self._averages)

    def kill(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            ray.kill(worker.handle)


def _describe_exit(error: BaseException | None) -> str:
    found = _EXIT_TYPE.search(str(error))
    return found[1] if found else type(error).__name__
