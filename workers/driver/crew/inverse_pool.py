"""The inverse workers as the driver sees them: who owns which layers, who died, who replaces whom.

The death of an inverse worker does not stop the training. Its layers are *orphaned*: the parameter
server learns this at once and keeps using their last good inverses. A successor starts in the
background with the factors of the newest snapshot, and is connected between two steps. A worker
that stalls is killed, and is then dead like any other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import ray

from kfac_dist.coordination.steps.kept_statistics import CatchUp, plan_catch_up
from kfac_dist.core.packing import LOWER, unpack
from kfac_dist.errors import JobFailedError
from workers.actor import Handle, Ref, gpu_options
from workers.device import DevicePlan
from workers.driver.crew.deaths import InverseWorkerDied, exit_type, pid_of
from workers.driver.crew.failures import Member, failed_among, failure_of, finished
from workers.driver.crew.health import InverseStatuses, Stall
from workers.exchange.arrays import Array, to_array, to_tensor
from workers.exchange.messages import InverseSetup, InverseStatus, JobContext, RefreshRequest
from workers.inverse_worker.actor import InverseWorkerActor
from workers.member.outbox import SentReport
from workers.planning import step_schedule

ROLE = "inverse_worker"
COPY_PERIOD = 16
"""In steps with statistics: how often the averages are copied for a successor. A copy takes about
as long as averaging once."""

SUCCESSOR_SECONDS = 120.0
"""How long a successor may take to start; then it counts as dead, and has a successor itself."""

_COPY_SECONDS = 600.0
_STEP = ":step"


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
    ended_as: str = ""
    """Why the driver has killed it, as a word and below as a sentence; empty if it has not."""
    why: str = ""
    latest_seconds: float = math.inf
    """Of the monotonic clock: when it must have started."""
    lacks_nothing: bool = False
    """Whether it has got again all that its predecessor had been sent."""
    copy: Ref | None = None
    """A call for its averages, None if none is open."""


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
        self._owners = owners
        self._devices = devices
        self._averages = dict(averages)
        self._on_death = on_death
        self._workers: dict[int, _Worker] = {}
        self._joining: dict[int, _Worker] = {}  # they have no layers yet
        self._orphaned: dict[str, int] = {}  # to the rank of the worker that owned it
        self._awaited: set[str] = set()  # orphaned layers that the server waits for again
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

    def _start(self, setup: InverseSetup) -> _Worker:
        own = self._averages_of([layer.name for layer in setup.layers])
        gives_way = {"CUDA_MPS_CLIENT_PRIORITY": "1"} if self._devices.inverse_shares else {}
        gpu = gpu_options(self._devices.gpus_per_inverse_worker, **gives_way)
        options = InverseWorkerActor.options(num_cpus=0, resources={"inverse": 1}, **gpu)
        handle = options.remote(self._job, setup, self._devices, self._owners, own)
        return _Worker(
            setup=setup,
            handle=handle,
            lifeline=handle.lifeline.remote(),
            first_status=handle.status.remote(),
        )

    def _averages_of(self, names: Sequence[str]) -> dict[str, Array]:
        return {
            key: array
            for key, array in self._averages.items()
            if any(key.startswith(f"{name}:") for name in names)
        }

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
        self._orphaned |= dict.fromkeys(layers, rank)
        self._awaited -= set(layers)
        self._send_orphaned()
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
        self._owners = owners
        for worker in (*self._workers.values(), *self._joining.values()):
            worker.handle.set_owners.remote(owners)
        self._send_orphaned()

    def _report_death(
        self, dead: _Worker, error: BaseException | None, layers: tuple[str, ...]
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
            rank: max(worker.setup.applied_step, self._averages_step(self.assignment[rank]))
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

    def _take_copy(self, worker: _Worker) -> None:
        if worker.copy is None or not finished([worker.copy]):
            return
        if failure_of(worker.copy) is None and (copy := ray.get(worker.copy)):
            layers = [layer.name for layer in worker.setup.layers]
            if _newest_step(copy, layers) > self._averages_step(layers):
                self._keep(copy)
        worker.copy = None

    def has_started(self, rank: int) -> bool:
        """Return whether a worker answers."""
        ref = self._workers[rank].first_status
        return bool(finished([ref])) and failure_of(ref) is None

    def catch_up(self, rank: int, reports: Sequence[SentReport], last_step: int) -> CatchUp:
        """Tell a successor which steps to expect, and return them with those that are lost.

        Args:
            rank: that of the successor, which has started.
            reports: what it was sent until now by the members that could be asked.
            last_step: the last step that was done, if none of them has sent statistics.
        """
        worker = self._workers[rank]
        sent = [report.last_step for report in reports if report.last_step is not None]
        plan = plan_catch_up(
            self._statistics_steps(worker.setup.applied_step, max(sent, default=last_step)),
            self.assignment[rank],
            [report.layers for report in reports],
            done_step=min(sent, default=last_step),
        )
        worker.handle.expect.remote(plan.steps)
        worker.lacks_nothing = not plan.lost
        if plan.lost:
            for owner in dict.fromkeys(self._owners.values()):
                owner.lose_statistics.remote(self.assignment[rank], plan.lost[-1])
        return plan

    def _statistics_steps(self, after: int, last: int) -> list[int]:
        schedule, steps = step_schedule(self._job.spec), range(after + 1, last + 1)
        return [step for step in steps if schedule.plan(step).update_factors]

    def _averages_step(self, layers: Sequence[str]) -> int:
        return _newest_step(self._averages, layers)

    def _send_orphaned(self) -> list[Ref]:
        left = tuple(layer for layer in self._orphaned if layer not in self._awaited)
        return [owner.set_orphaned.remote(left) for owner in dict.fromkeys(self._owners.values())]

    def wait_again(self, layers: Collection[str]) -> list[Ref]:
        """Have the shards wait for new inverses of orphaned layers, which successors now make.

        Returns calls that end when the shards know.
        """
        self._awaited |= set(layers)
        return self._send_orphaned()

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
        self,
        versions: Mapping[str, int],
        oldest_admissible: Mapping[str, int],
        *,
        is_exact: bool,
    ) -> list[str]:
        """Return the layers that cease to be orphaned, given the versions now in use.

        A layer is orphaned until the version in use was made by the successor and is within the
        staleness bound. In an exact step both workers make the same version.
        """
        recovered = [
            layer
            for layer, rank in self._orphaned.items()
            # Only the successor can make versions from its first step on.
            if (connected := self._workers[rank].connected_step) is not None
            and versions.get(layer, 0)
            >= max(0 if is_exact else connected, oldest_admissible.get(layer, 1))
        ]
        for layer in recovered:
            del self._orphaned[layer]
            self._awaited.discard(layer)
        if recovered:
            self._send_orphaned()
        return recovered

    def poll(self) -> None:
        """Ask every connected worker for its status, and kill successors that do not start.

        `statuses` has the answers later. The death of a killed worker ends its lifeline.
        """
        now = time.monotonic()
        for worker in (*self._workers.values(), *self._joining.values()):
            if now > worker.latest_seconds and not finished([worker.first_status]):
                self._end(worker, "stalled", f"it did not start within {SUCCESSOR_SECONDS:g} s")
        self._statuses.ask(
            {
                rank: worker.handle
                for rank, worker in self._workers.items()
                if worker.connected_step is not None
            }
        )

    def end_stalled(self, stall: Stall) -> None:
        """Kill a worker that does not advance."""
        self._end(self._workers[stall.member.rank], "stalled", stall.why)

    def end_preempted(self, rank: int) -> None:
        """Kill a worker that has had notice that it will be ended."""
        why = "its process had notice (SIGTERM) that it would be ended"
        self._end(self._workers[rank], "preempted", why)

    @staticmethod
    def _end(worker: _Worker, ended_as: str, why: str) -> None:
        if not worker.ended_as:
            worker.ended_as, worker.why = ended_as, why
            ray.kill(worker.handle)

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

    def keep_snapshot(self, averages: Mapping[str, Array]) -> None:
        """Keep averages for successors."""
        self._keep(averages)

    def known_averages(self) -> dict[str, Array]:
        """Return the newest averages that are known of every layer; some may be packed."""
        return dict(self._averages)

    def _keep(self, averages: Mapping[str, Array]) -> None:
        """Replace what is known of the layers in `averages`; names of arrays may differ."""
        new = tuple(key.removesuffix("step") for key in averages if key.endswith(_STEP))
        self._averages = {k: v for k, v in self._averages.items() if not k.startswith(new)}
        self._averages |= averages

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
        return not self._orphaned and self.num_starting == 0

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
            call = worker.handle.reassign.remote(setup, self._averages_of(new), timeout_seconds)
            calls[call] = Member(role=ROLE, rank=rank, pid=worker.pid)
        for rank in [rank for rank in self._workers if rank not in setups]:
            ray.kill(self._workers.pop(rank).handle)
            self._statuses.forget(rank)
        return calls

    def kill(self) -> None:
        """End all workers."""
        for worker in (*self._workers.values(), *self._joining.values()):
            ray.kill(worker.handle)


def _newest_step(averages: Mapping[str, Array], layers: Sequence[str]) -> int:
    return max((int(averages.get(f"{name}{_STEP}", 0)) for name in layers), default=0)


def unpack_averages(averages: Mapping[str, Array]) -> dict[str, Array]:
    """Return averages as checkpoints have them: no matrix is packed."""
    return {
        name.removesuffix(LOWER): to_array(unpack(to_tensor(array)))
        if name.endswith(LOWER)
        else array
        for name, array in averages.items()
    }
