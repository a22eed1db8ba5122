"""The gradient worker as a Ray actor; the work is in `workers.gradient_worker.work`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

import ray
import torch

from kfac_dist.data import Split
from workers.actor import Handle, as_actor, logged, node_address, role_log, wait_forever
from workers.device import DevicePlan
from workers.exchange.arrays import Array, Arrays
from workers.exchange.messages import (
    EvaluationSums,
    JobContext,
    Rendezvous,
    StatisticsHeader,
    StepOrder,
    WorkerReport,
)
from workers.exchange.parcels import StatisticsParcel
from workers.exchange.process_group import Group, join_group, join_store
from workers.gradient_worker.work import GradientWork


class GradientWorker:
    """Computes on its part of every batch."""

    def __init__(
        self, job: JobContext, rank: int, devices: DevicePlan, host: str | None, threads: int
    ) -> None:
        self._job = job
        self._rank = rank
        self._devices = devices
        self._host = host or node_address()
        self._threads = threads
        self._inverse_workers: Mapping[int, Handle] = {}
        self._group: Group | None = None
        self._log = role_log(job, "gradient_worker", rank)

    def build(self, buffers: Arrays) -> int:
        """Load task, data and model, with these of its buffers; return the process id."""
        torch.set_num_threads(self._threads)
        build = partial(
            GradientWork, self._job, self._rank, self._devices.device(), self._send_statistics
        )
        self._work = logged(self._log, "build", build)
        self._work.set_buffers(buffers)
        self._log.info("built", threads=self._threads, device=self._devices.kind)
        return os.getpid()

    def join(self, rendezvous: Rendezvous) -> None:
        """Join a group and take over the server's parameters."""
        self._group = join_group(
            rendezvous,
            join_store(rendezvous),
            rank=self._rank,
            own_host=self._host,
            backend=self._devices.backend,
            device=self._devices.device(),
        )
        self._work.join(self._group)
        self._log.info("joined", group=rendezvous.epoch)

    def connect(
        self,
        inverse_workers: Mapping[int, Handle],
        assignment: Mapping[int, tuple[str, ...]],
        assignment_epochs: Mapping[int, int],
    ) -> None:
        """Send statistics to these inverse workers from now on."""
        self._inverse_workers = inverse_workers
        self._work.connect(assignment, assignment_epochs)

    def _send_statistics(
        self, worker: int, header: StatisticsHeader, parcel: StatisticsParcel | None
    ) -> None:
        self._inverse_workers[worker].update.remote(header, parcel)

    def step(self, order: StepOrder) -> WorkerReport:
        """Do this worker's part of a step; leave the group on an error, so that nobody waits."""
        try:
            return logged(self._log, f"step {order.plan.step}", lambda: self._work.step(order))
        except Exception:
            if self._group is not None:
                self._group.leave()
            raise

    def evaluate(self, split: Split, parameters: Array | None) -> EvaluationSums:
        """Evaluate this worker's part of a split."""
        return logged(self._log, "evaluate", lambda: self._work.evaluate(split, parameters))

    def buffers(self) -> dict[str, Array]:
        """Return the buffers of this worker's model."""
        return self._work.buffers()

    def set_buffers(self, values: Arrays) -> None:
        """Take over buffers."""
        self._work.set_buffers(values)

    def checksum(self) -> str:
        """Return the checksum of the mirrored parameters."""
        return self._work.checksum()

    @ray.method(concurrency_group="control")
    def status(self) -> int:
        """Return the process id."""
        return os.getpid()

    @ray.method(concurrency_group="lifeline")
    def lifeline(self) -> None:
        """Never return: the caller learns of this actor's death at once."""
        wait_forever()


GradientWorkerActor = as_actor(GradientWorker, "control", "lifeline")
