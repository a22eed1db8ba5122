"""A member of the process group as a Ray actor; the work is in `roles` beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
import torch

from kfac_dist.data import Split
from kfac_dist.optim.arithmetic import float32_precision
from kfac_dist.optim.precision import PreconditionDtype
from workers.actor import (
    Handle,
    as_actor,
    enter_code_folder,
    logged,
    member_device,
    node_address,
    note_preemptions,
    role_log,
)
from workers.device import DevicePlan
from workers.exchange.arrays import Array, Arrays
from workers.exchange.member_progress import MemberProgress
from workers.exchange.messages import (
    EvaluationSums,
    InverseMessage,
    JobContext,
    MemberPlace,
    MemberReport,
    Rendezvous,
    StepOrder,
)
from workers.exchange.process_group import Group, join_group, join_store
from workers.gradient_worker.build import build_gradient_work
from workers.gradient_worker.work import GradientWork
from workers.heartbeat import Heartbeat, Pulse
from workers.member.outbox import Outbox, SentReport
from workers.member.roles import MemberRoles
from workers.parameter_server.build import BuiltShard, ShardBuilder
from workers.this_node import on_this_node


@dataclass(frozen=True, kw_only=True)
class MemberReady:
    """Tells the driver that a member is built.

    `precondition_dtype` is the type in which it applies inverses, if that was measured; None if
    the job specification gives the type, and for a first-order optimizer. `float32_precision` is
    what torch's settings allow once the user's task is loaded.
    """

    pid: int
    precondition_dtype: PreconditionDtype | None
    float32_precision: str


class GroupMember:
    """Computes on its part of every batch, owns a shard of the parameters, or both.

    The driver calls `build` and `join` first, and `connect` when there are inverse workers.
    """

    def __init__(
        self,
        job: JobContext,
        place: MemberPlace,
        devices: DevicePlan,
        host: str | None,
        threads: int,
        timeout_seconds: float,
    ) -> None:
        self._job = job = on_this_node(job)
        self._place = place
        self._devices = devices
        self._host = host or node_address()
        self._threads = threads
        self._timeout_seconds = timeout_seconds
        self._outbox = Outbox()
        self._roles: MemberRoles  # set by `build`
        self._builder: ShardBuilder | None = None  # made when this process first has a shard
        self._device: torch.device  # set by `build`
        self._heartbeat = Heartbeat()
        role = "parameter_server" if place.worker is None else "gradient_worker"
        rank = place.worker if place.worker is not None else place.shard
        self._log = role_log(job, role, rank or 0)
        note_preemptions(self._heartbeat)

    def build(self, buffers: Arrays, snapshot: Arrays | None) -> MemberReady:
        """Load task, data and model; restore a checkpoint's state, if it is given.

        Args:
            buffers: the buffers of the model.
            snapshot: this shard's part of the server's state; None at the start of a run.
        """
        logged(self._log, "files", lambda: enter_code_folder(self._job))
        torch.set_num_threads(self._threads)
        self._device = member_device(self._devices)
        worker = shard = None
        with self._heartbeat.doing("build"):
            if self._place.worker is not None:
                worker = logged(self._log, "build", lambda: self._build_worker(buffers))
            if self._place.shard is not None:
                shard = logged(self._log, "build", lambda: self._build_shard(snapshot))
        self._roles = MemberRoles(worker, shard)
        self._log.info("built", threads=self._threads, device=str(self._device))
        return MemberReady(
            pid=os.getpid(),
            precondition_dtype=shard.precondition_dtype if shard else None,
            float32_precision=float32_precision(),
        )

    def _build_worker(self, buffers: Arrays) -> GradientWork:
        rank = self._place.worker or 0
        worker = build_gradient_work(self._job, rank, self._device, self._outbox.send)
        worker.set_buffers(buffers)
        return worker

    def _build_shard(self, snapshot: Arrays | None) -> BuiltShard:
        assert self._place.shard is not None
        if self._builder is None:
            self._builder = ShardBuilder(
                self._job, self._device, self._timeout_seconds, self._outbox.request
            )
        built = self._builder.build(self._place.shard, self._place.num_shards)
        if snapshot is not None:
            built.shard.restore(snapshot)
        return built

    def progress(self) -> MemberProgress:
        """Return how far this member has come, after its group has ended."""
        return self._roles.progress()

    def rewind(self, step: int) -> None:
        """Go back to the end of `step`, which is the last one or the one before it."""
        self._roles.rewind(step)
        self._outbox.rewind(step)

    def mirrored_state(self) -> dict[str, Array]:
        """Return the parameters and the previous update [P], as this gradient worker has them."""
        return self._worker.mirrored_state()

    def mirrored_average(self, shard: int) -> dict[str, Array]:
        """Return the average of a shard, as this gradient worker mirrors it."""
        return self._worker.mirrored_average(shard)

    def own_shard(
        self, place: MemberPlace, snapshot: Arrays | None, accepted_statistics: Sequence[int]
    ) -> None:
        """Have the shard of `place`, from now on and with this state; none if it has none.

        Args:
            place: the roles of this member from now on.
            snapshot: the state of the shard.
            accepted_statistics: the steps whose statistics were accepted.
        """
        self._place = place
        shard = None
        if place.shard is not None:
            with self._heartbeat.doing("build"):
                shard = logged(self._log, "build", lambda: self._build_shard(snapshot))
        self._roles.replace_shard(shard, accepted_statistics)

    def join(self, rendezvous: Rendezvous, place: MemberPlace) -> None:
        """Join a group; the gradient workers start from the parameters of the shards."""
        self._place = place

        def join(rank: int) -> Group:
            return join_group(
                rendezvous,
                join_store(rendezvous),
                rank=rank,
                own_host=self._host,
                backend=self._devices.backend,
                device=self._device,
            )

        shard_rank = rendezvous.num_gradient_workers + (self._place.shard or 0)
        self._roles.join(join, self._place.worker or 0, shard_rank, rendezvous.step)
        self._log.info("joined", group=rendezvous.epoch)

    def connect(
        self,
        inverse_workers: Mapping[int, Handle],
        assignment: Mapping[int, tuple[str, ...]],
        assignment_epochs: Mapping[int, int],
        copied_steps: Mapping[int, int],
    ) -> None:
        """Send statistics and requests to these inverse workers from now on; see `Outbox`."""
        if self._roles.worker is not None:
            self._roles.worker.connect(assignment, assignment_epochs)
        self._outbox.connect(inverse_workers, assignment_epochs, copied_steps)

    @ray.method(concurrency_group="control")
    def reconnect(
        self,
        inverse_workers: Mapping[int, Handle],
        assignment_epochs: Mapping[int, int],
        copied_steps: Mapping[int, int],
    ) -> None:
        """Send to the successor of an inverse worker from now on, also in the middle of a step."""
        self._outbox.connect(inverse_workers, assignment_epochs, copied_steps)

    @ray.method(concurrency_group="control")
    def sent_to(self, inverse_worker: int) -> SentReport:
        """Return what an inverse worker that has just started was sent while it did."""
        return self._outbox.report(inverse_worker)

    @ray.method(concurrency_group="control")
    def forget_statistics(self, copied_steps: Mapping[int, int]) -> None:
        """Forget the statistics up to these steps, by inverse worker; they are safe."""
        self._outbox.forget(copied_steps)

    def run(self, orders: Sequence[StepOrder]) -> list[MemberReport]:
        """Do this member's part of a window of steps."""
        first, last = orders[0].plan.step, orders[-1].plan.step
        doing = f"step {first}" if first == last else f"steps {first} to {last}"
        with self._heartbeat.doing("step", first):
            return logged(self._log, doing, lambda: self._roles.run(orders))

    @property
    def _worker(self) -> GradientWork:
        assert self._roles.worker is not None, "this member is not a gradient worker"
        return self._roles.worker

    @property
    def _shard(self) -> BuiltShard:
        assert self._roles.shard is not None, "this member has no shard"
        return self._roles.shard

    def evaluate(
        self, split: Split, parameters: Array | None, before: Sequence[EvaluationSums]
    ) -> EvaluationSums:
        """Evaluate more of this worker's part of a split; `before`: so far, of each worker."""
        so_far = before[self._place.worker or 0] if before else None
        with self._heartbeat.doing("evaluation"):
            return logged(
                self._log, "evaluate", lambda: self._worker.evaluate(split, parameters, so_far)
            )

    def buffers(self) -> dict[str, Array]:
        """Return the buffers of this worker's model."""
        return self._worker.buffers()

    def set_buffers(self, values: Arrays) -> None:
        """Set the buffers of this worker's model."""
        self._worker.set_buffers(values)

    def mirrored_checksums(self) -> tuple[str, ...]:
        """Return the checksums of what this worker mirrors of each shard."""
        return self._worker.checksums()

    def next_gammas(self, step: int) -> tuple[float, ...]:
        """Return the gammas to invert with for `step`."""
        return self._shard.shard.next_gammas(step)

    def averaged_parameters(self) -> Array | None:
        """Return the shard's averaged parameters [Q], None before there is an average."""
        return self._shard.shard.state.averaged()

    def snapshot(self) -> dict[str, Array]:
        """Return everything of the shard that the next step depends on."""
        with self._heartbeat.doing("snapshot"):
            return self._shard.shard.snapshot()

    def checksum(self) -> str:
        """Return the checksum of what the gradient workers mirror of this shard."""
        return self._shard.shard.checksum()

    @ray.method(concurrency_group="mailbox")
    def accept(self, message: InverseMessage) -> None:
        """Put the inverses of a layer where the next step finds them."""
        shard = self._roles.shard
        if shard is not None and shard.store is not None:  # else the layer has just moved
            store = shard.store
            logged(self._log, f"inverse of {message.header.layer}", lambda: store.accept(message))

    @ray.method(concurrency_group="heartbeat")
    def pulse(self) -> Pulse:
        """Return what this process is doing."""
        return self._heartbeat.pulse()

    @ray.method(concurrency_group="control")
    def set_orphaned(self, layers: tuple[str, ...]) -> None:
        """Set the layers that nobody refreshes now; a step that waits for one sees it too."""
        shard = self._roles.shard
        if shard is not None and shard.store is not None:
            shard.store.set_orphaned(layers)

    @ray.method(concurrency_group="control")
    def lose_statistics(self, layers: tuple[str, ...], step: int) -> None:
        """Do without versions of these layers up to `step`: the statistics for them are lost."""
        shard = self._roles.shard
        if shard is not None and shard.store is not None:
            shard.store.lose_statistics(layers, step)


class GradientWorker(GroupMember):
    """A gradient worker, which may have a shard; the name is that of its process."""


class ParameterServer(GroupMember):
    """A shard of the parameter server in a process of its own."""


GradientWorkerActor: Handle = as_actor(GradientWorker, "mailbox", "control")
ParameterServerActor: Handle = as_actor(ParameterServer, "mailbox", "control")
