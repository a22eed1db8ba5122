"""The inverse workers as the driver sees them: who owns which layers, who died, who replaces whom.

The death of an inverse worker does not stop the training. Its layers are *orphaned*: the parameter
server learns this at once and keeps using their last good inverses. A successor starts in the
background with the factors of the newest snapshot, and is connected between two steps. A worker
that stalls is killed, and is then dead like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import ray

from kfac_dist.errors import JobFailedError
from workers.actor import Handle, Ref
from workers.device import DevicePlan
from workers.driver.crew.deaths import InverseWorkerDied, exit_type, pid_of
from workers.driver.crew.failures import Member, failed_among, failure_of, finished
from workers.driver.crew.health import InverseStatuses, Stall
from workers.driver.crew.inverse.inverse_process import InverseProcess, start_inverse_process
from workers.driver.crew.inverse.kept_averages import KeptAverages, newest_step
from workers.driver.crew.inverse.orphans import Orphans
from workers.exchange.arrays import Array
from workers.exchange.messages import InverseSetup, InverseStatus, JobContext, RefreshRequest

ROLE = "inverse_worker"
COPY_PERIOD = 16
"""In steps with statistics: how often the averages are copied for a successor. A copy takes about
as long as averaging once."""

SUCCESSOR_SECONDS = 120.0
"""How long a successor may take to start; then it counts as dead, and has a successor itself."""

_COPY_SECONDS = 600.0


class InversePool:
    """All inverse workers of a job, started by `launch`. Not thread-safe."""

    def __init__(
        self,
        job: JobContext,
        owners: Mapping[str, Handle],
        devices: DevicePlan,
        averages: Mapping[str, Array],
        on_death: Callable[[InverseWorkerDied], None],
    ) -> None:
        self._job = job
        self._devices = devices
        self.averages = KeptAverages(averages)
        self.orphans = Orphans(owners)
        self._on_death = on_death
        self._workers: dict[int, InverseProcess] = {}
        self._joining: dict[int, InverseProcess] = {}  # they have no layers yet
        self._num_deaths = 0
        self._statuses = InverseStatuses()

    @classmethod
    def launch(
        cls,
        job: JobContext,
        owners: Mapping[str, Handle],
        devices: DevicePlan,
        setups: Sequence[InverseSetup],
        averages: Mapping[str, Array],
        on_death: Callable[[InverseWorkerDied], None],
    ) -> InversePool:
        """Start a worker for each setup, without waiting until it is there.

        Args:
            job: the job, as every actor receives it.
            owners: the member that has the shard of each layer, to which its inverses are sent.
            devices: where the workers compute.
            setups: the layers of each worker.
            averages: factors of all layers from a checkpoint; empty in a new run.
            on_death: called by `handle_death`.
        """
        pool = cls(job, owners, devices, averages, on_death)
        pool._workers = {setup.rank: pool._start(setup) for setup in setups}
        return pool

    def _start(self, setup: InverseSetup) -> InverseProcess:
        own = self.averages.of_layers([layer.name for layer in setup.layers])
        return start_inverse_process(self._job, setup, self._devices, self.orphans.owners, own)

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
        return self.orphans.names

    @property
    def num_deaths(self) -> int:
        """The number of deaths in this attempt."""
        return self._num_deaths

    def first_statuses(self) -> dict[Ref, Member]:
        """Return a call to each worker that returns once the worker has started."""
        return {w.first_status: Member(role=ROLE, rank=rank) for rank, w in self._workers.items()}

    def lifelines(self) -> list[Ref]:
        """Return a call to each worker that ends only when the worker dies."""
        workers = (*self._workers.values(), *self._joining.values())
        return [worker.lifeline for worker in workers]

    def handle_death(self, lifeline: Ref) -> int:
        """Orphan the layers of the worker whose lifeline has ended, and start its successor.

        Returns the rank of the two.

        Raises:
            JobFailedError: the worker found that the job cannot continue.
        """
        (dead,) = [
            worker
            for worker in (*self._workers.values(), *self._joining.values())
            if worker.lifeline == lifeline
        ]
        error = failure_of(lifeline)
        if isinstance(error, JobFailedError):
            raise error  # a successor would fail in the same way
        rank = dead.setup.rank
        ray.kill(dead.handle)  # its work may have failed while the process lives
        if self._joining.get(rank) is dead:
            del self._joining[rank]
            self._report_death(dead, error, ())
            return rank
        self._take_copy(dead)
        layers = self.assignment[rank]
        self.orphans.add(layers, rank)
        self._statuses.forget(rank)
        self._report_death(dead, error, layers)
        copied = self.copied_steps[rank]
        setup = replace(
            dead.setup,
            assignment_epoch=dead.setup.assignment_epoch + 1,
            applied_step=copied,
            # An exact version of the copied step itself may not have been made.
            exact_step=max(0, copied - 1),
            catches_up=True,
        )
        self._workers[rank] = self._start(setup)
        self._workers[rank].latest_seconds = time.monotonic() + SUCCESSOR_SECONDS
        return rank

    def set_owners(self, owners: Mapping[str, Handle]) -> None:
        """Have inverses sent to the present owners of the shards, the newest ones once more."""
        self.orphans.owners = owners
        for worker in (*self._workers.values(), *self._joining.values()):
            worker.handle.set_owners.remote(owners)
        self.orphans.send()

    def _report_death(
        self, dead: InverseProcess, error: BaseException | None, layers: tuple[str, ...]
    ) -> None:
        self._num_deaths += dead.ended_as != "preempted"
        self._on_death(
            InverseWorkerDied(
                rank=dead.setup.rank,
                pid=pid_of(error, dead.pid),
                layers=layers,
                exit=dead.ended_as or exit_type(error),
                why=dead.why,
                num_deaths=self._num_deaths,
            )
        )

    @property
    def copied_steps(self) -> dict[int, int]:
        """By rank, up to which step statistics are in averages that outlive the worker."""
        return {
            rank: max(worker.setup.applied_step, self.averages.newest_step(self.assignment[rank]))
            for rank, worker in self._workers.items()
        }

    def take_copies(self) -> bool:
        """Keep the averages that have come, and ask for newer ones; return whether any has.

        At most one call to a worker is open, and it interrupts no inversion.
        """
        before = self.copied_steps
        for rank, worker in self._workers.items():
            if worker.connected_step is None:
                continue
            self._take_copy(worker)
            if worker.copy is None:
                least = self.copied_steps[rank] + COPY_PERIOD
                worker.copy = worker.handle.copy.remote(least, _COPY_SECONDS)
        return before != self.copied_steps

    def _take_copy(self, worker: InverseProcess) -> None:
        if worker.copy is None or not finished([worker.copy]):
            return
        if failure_of(worker.copy) is None and (copy := ray.get(worker.copy)):
            layers = [layer.name for layer in worker.setup.layers]
            if newest_step(copy, layers) > self.averages.newest_step(layers):
                self.averages.keep(copy)
        worker.copy = None

    def process(self, rank: int) -> InverseProcess:
        """Return the present worker of a rank."""
        return self._workers[rank]

    def has_started(self, rank: int) -> bool:
        """Return whether a worker answers."""
        ref = self._workers[rank].first_status
        return bool(finished([ref])) and failure_of(ref) is None

    def starting(self, layers: Collection[str]) -> tuple[int, ...]:
        """Return the ranks of the workers that own some of these layers and have not started."""
        ranks = {rank for rank, own in self.assignment.items() if not set(layers).isdisjoint(own)}
        started = {
            rank
            for rank in ranks
            if finished([(worker := self._workers[rank]).first_status])
            or worker.connected_step is not None
        }
        return tuple(sorted(ranks - started))

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
        self, versions: Mapping[str, int], oldest_admissible: Mapping[str, int], *, is_exact: bool
    ) -> list[str]:
        """Return the layers that cease to be orphaned; see `Orphans.note_versions`."""
        return self.orphans.note_versions(
            versions,
            oldest_admissible,
            lambda rank: self._workers[rank].connected_step,
            is_exact=is_exact,
        )

    def poll(self) -> None:
        """Ask every connected worker for its status, and kill successors that do not start.

        `statuses` has the answers later. The death of a killed worker ends its lifeline.
        """
        now = time.monotonic()
        for worker in (*self._workers.values(), *self._joining.values()):
            if now > worker.latest_seconds and not finished([worker.first_status]):
                worker.end("stalled", f"it did not start within {SUCCESSOR_SECONDS:g} s")
        self._statuses.ask(
            {
                rank: worker.handle
                for rank, worker in self._workers.items()
                if worker.connected_step is not None
            }
        )

    def end_stalled(self, stall: Stall) -> None:
        """Kill a worker that does not advance."""
        self._workers[stall.member.rank].end("stalled", stall.why)

    def end_preempted(self, rank: int) -> None:
        """Kill a worker that has had notice that it will be ended."""
        why = "its process had notice (SIGTERM) that it would be ended"
        self._workers[rank].end("preempted", why)

    def members(self) -> dict[Member, Handle]:
        """Return the workers, as those whose heartbeat is watched."""
        return {
            Member(role=ROLE, rank=rank, pid=worker.pid): worker.handle
            for rank, worker in self._workers.items()
        }

    def statuses(self) -> dict[int, InverseStatus]:
        """Return the newest answer of each worker."""
        return self._statuses.newest()

    @property
    def num_starting(self) -> int:
        """The number of workers not connected yet: in a running job, successors of dead ones."""
        return sum(worker.connected_step is None for worker in self._workers.values())

    def snapshots(self, step: int, timeout_seconds: float) -> dict[Ref, Member]:
        """Ask the connected workers for their averages, which must include statistics of `step`."""
        return {
            worker.handle.snapshot.remote(step, timeout_seconds): Member(role=ROLE, rank=rank)
            for rank, worker in self._workers.items()
            if worker.connected_step is not None
            and (worker.lacks_nothing or worker.connected_step <= step)
        }

    @property
    def setups(self) -> dict[int, InverseSetup]:
        """What each worker owns, by rank."""
        return {rank: worker.setup for rank, worker in self._workers.items()}

    @property
    def num_joining(self) -> int:
        """The number of workers that have been started and have no layers yet."""
        return len(self._joining)

    @property
    def is_whole(self) -> bool:
        """Whether every layer has a worker that has started and made an inverse of it."""
        return not self.orphans.names and self.num_starting == 0

    def join(self, setups: Mapping[int, InverseSetup]) -> bool:
        """Start workers of new ranks, without layers; return whether all of them have started.

        Workers that were started for ranks that are not in `setups` end.
        """
        for rank in [rank for rank in self._joining if rank not in setups]:
            ray.kill(self._joining.pop(rank).handle)
        for rank, setup in setups.items():
            if rank not in self._workers and rank not in self._joining:
                self._joining[rank] = self._start(replace(setup, layers=(), links=()))
                self._joining[rank].latest_seconds = time.monotonic() + SUCCESSOR_SECONDS
        first = [worker.first_status for worker in self._joining.values()]
        return len(finished(first)) == len(first) and not failed_among(dict.fromkeys(first))

    def hand_over(
        self, setups: Mapping[int, InverseSetup], step: int, timeout_seconds: float
    ) -> dict[Ref, Member]:
        """Give every layer to the worker that has it in `setups`, with its newest snapshot.

        Workers whose ranks are not in `setups` end. The caller waits for the calls that are
        returned, and connects the gradient workers from `step` on.
        """
        calls = {}
        for rank, setup in setups.items():
            joined = self._joining.pop(rank, None)
            worker = joined or self._workers[rank]
            if setup == worker.setup:
                continue
            new = [layer.name for layer in setup.layers if layer not in worker.setup.layers]
            self._workers[rank] = worker
            worker.setup, worker.connected_step = setup, step
            worker.copy = None  # of the layers that it had before
            if joined is not None:
                worker.pid = ray.get(worker.first_status).pid
            call = worker.handle.reassign.remote(
                setup, self.averages.of_layers(new), timeout_seconds
            )
            calls[call] = Member(role=ROLE, rank=rank, pid=worker.pid)
        for rank in [rank for rank in self._workers if rank not in setups]:
            ray.kill(self._workers.pop(rank).handle)
            self._statuses.forget(rank)
        return calls

    def kill(self) -> None:
        """End all workers."""
        for worker in (*self._workers.values(), *self._joining.values()):
            ray.kill(worker.handle)
