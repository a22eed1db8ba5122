"""The gradient worker as a Ray actor; the work is in `workers.gradient_worker.work`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from kfac_dist.data import Split
from workers.actor import Handle, as_actor, enter_code_folder, logged, node_address, role_log
from workers.device import DevicePlan
from workers.exchange.arrays import Array, Arrays
from workers.exchange.messages import (
    EvaluationSums,
    JobContext,
    Rendezvous,
    StatisticsMessage,
    StepOrder,
    WorkerReport,
)
from workers.exchange.process_group import Group, join_group, join_store
from workers.gradient_worker.build import build_gradient_work
from workers.gradient_worker.work import GradientWork
from workers.this_node import on_this_node


class GradientWorker:
    """Computes on its part of every batch.

    The driver calls `build` and `join` first, and `connect` when there are inverse workers.
    """

    def __init__(
        self, job: JobContext, rank: int, devices: DevicePlan, host: str | None, threads: int
    ) -> None:
        self._job = job = on_this_node(job)
        self._rank = rank
        self._devices = devices
        self._host = host or node_address()
        self._threads = threads
        self._inverse_workers: Mapping[int, Handle] = {}
        self._work: GradientWork  # set by `build`
        self._group: Group  # set by `join`
        self._log = role_log(job, "gradient_worker", rank)

    def build(self, buffers: Arrays) -> int:
        """Load task, data and model, set the model's `buffers`, and return the process id."""
        logged(self._log, "files", lambda: enter_code_folder(self._job))
        torch.set_num_threads(self._threads)
        self._work = logged(self._log, "build", self._build_work)
        self._work.set_buffers(buffers)
        self._log.info("built", threads=self._threads, device=self._devices.kind)
        return os.getpid()

    def _build_work(self) -> GradientWork:
        device = self._devices.device()
        return build_gradient_work(self._job, self._rank, device, self._send_statistics)

    def join(self, rendezvous: Rendezvous) -> None:
        """Join a group, and start from the server's parameters."""
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

    def _send_statistics(self, inverse_worker: int, message: StatisticsMessage) -> None:
        self._inverse_workers[inverse_worker].update.remote(message)

    def step(self, order: StepOrder) -> WorkerReport:
        """Do this worker's part of a step; on an error, leave the group so that nobody waits."""
        try:
            return logged(self._log, f"step {order.plan.step}", lambda: self._work.step(order))
        except Exception:
            self._group.leave()
            raise

    def evaluate(
        self, split: Split, parameters: Array | None, before: Sequence[EvaluationSums]
    ) -> EvaluationSums:
        """Evaluate more of this worker's part of a split; `before`: so far, of each worker."""
        so_far = before[self._rank] if before else None
        return logged(self._log, "evaluate", lambda: self._work.evaluate(split, parameters, so_far))

    def buffers(self) -> dict[str, Array]:
        """Return the buffers of this worker's model."""
        return self._work.buffers()

    def set_buffers(self, values: Arrays) -> None:
        """Set the buffers of this worker's model."""
        self._work.set_buffers(values)

    def checksum(self) -> str:
        """Return the checksum of the mirrored parameters."""
        return self._work.checksum()


GradientWorkerActor = as_actor(GradientWorker)
