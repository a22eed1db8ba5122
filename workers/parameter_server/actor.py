"""The parameter server as a Ray actor; the work is in `kfac` and `first_order` beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray
import torch

from kfac_dist.optim.precision import PreconditionDtype
from workers.actor import as_actor, enter_code_folder, logged, node_address, role_log
from workers.device import DevicePlan
from workers.exchange.arrays import Array, Arrays
from workers.exchange.messages import (
    InverseMessage,
    JobContext,
    Rendezvous,
    ServerReport,
    StepOrder,
)
from workers.exchange.process_group import Group, host_store, join_group
from workers.parameter_server.build import BuiltServer, build_server
from workers.this_node import on_this_node


@dataclass(frozen=True, kw_only=True)
class ServerReady:
    """Tells the driver that the server is built, and where the group's store listens.

    `precondition_dtype` is the type in which it applies inverses, if that was measured; None if
    the job specification gives the type, and for a first-order optimizer.
    """

    pid: int
    host: str
    port: int
    precondition_dtype: PreconditionDtype | None


class ParameterServer:
    """Owns parameters, previous update, damping, gamma and the inverses it has received.

    The driver calls `build` and `join` before anything else.
    """

    def __init__(
        self, job: JobContext, devices: DevicePlan, host: str | None, timeout_seconds: float
    ) -> None:
        self._job = job = on_this_node(job)
        self._devices = devices
        self._host = host or node_address()
        self._timeout_seconds = timeout_seconds
        self._built: BuiltServer  # set by `build`
        self._group: Group  # set by `join`
        self._log = role_log(job, "parameter_server", 0)

    def build(self, snapshot: Arrays | None) -> ServerReady:
        """Build the server, restore a checkpoint's snapshot if given one, and open the store."""
        logged(self._log, "files", lambda: enter_code_folder(self._job))
        torch.set_num_threads(1)
        self._built = logged(self._log, "build", lambda: self._build(snapshot))
        self._tcp_store = host_store(self._host, self._timeout_seconds)
        self._log.info("built", device=self._devices.kind, backend=self._devices.backend)
        return ServerReady(
            pid=os.getpid(),
            host=self._host,
            port=self._tcp_store.port,
            precondition_dtype=self._built.precondition_dtype,
        )

    def _build(self, snapshot: Arrays | None) -> BuiltServer:
        built = build_server(self._job, self._devices.device(), self._timeout_seconds)
        if snapshot is not None:
            built.server.restore(snapshot)
        return built

    def join(self, rendezvous: Rendezvous) -> None:
        """Join a group as its last rank, and send the workers the parameters."""
        self._group = join_group(
            rendezvous,
            self._tcp_store,
            rank=rendezvous.num_gradient_workers,
            own_host=self._host,
            backend=self._devices.backend,
            device=self._devices.device(),
        )
        self._built.server.join(self._group)

    def next_gammas(self, step: int) -> tuple[float, ...]:
        """Return the gammas to invert with for `step`."""
        return self._built.server.next_gammas(step)

    def step(self, order: StepOrder) -> ServerReport:
        """Do the server's part of a step; on an error, leave the group so that nobody waits."""
        try:
            doing = f"step {order.plan.step}"
            return logged(self._log, doing, lambda: self._built.server.step(order))
        except Exception:
            self._group.leave()
            raise

    def averaged_parameters(self) -> Array | None:
        """Return the averaged parameters [P], None before there is an average."""
        return self._built.server.state.averaged()

    def snapshot(self) -> dict[str, Array]:
        """Return everything the next step depends on."""
        return self._built.server.snapshot()

    def checksum(self) -> str:
        """Return the checksum of what the gradient workers mirror."""
        return self._built.server.checksum()

    @ray.method(concurrency_group="mailbox")
    def accept(self, message: InverseMessage) -> None:
        """Put the inverses of a layer where the next step finds them."""
        assert self._built.store is not None, "a first-order optimizer has no inverses"
        self._built.store.accept(message)

    @ray.method(concurrency_group="control")
    def set_orphaned(self, layers: tuple[str, ...]) -> None:
        """Set the layers that nobody refreshes now; a step that waits for one sees it too."""
        if self._built.store is not None:
            self._built.store.set_orphaned(layers)


ParameterServerActor = as_actor(ParameterServer, "mailbox", "control")
