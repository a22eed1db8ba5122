"""The parameter server as a Ray actor; the work is in `kfac_server` and `first_order_server`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import ray
import torch

from kfac_dist.optim.precision import PreconditionDtype
from workers.actor import as_actor, logged, node_address, role_log, wait_forever
from workers.device import DevicePlan
from workers.exchange.arrays import Array
from workers.exchange.messages import InverseHeader, JobContext, Rendezvous, ServerReport, StepOrder
from workers.exchange.parcels import InverseParcel
from workers.exchange.process_group import Group, host_store, join_group
from workers.parameter_server.build import BuiltServer, build_server


class ServerReady(NamedTuple):
    """A parameter server that has been built, and where its store is.

    `precondition` is in which type it applies inverses, where that was left to a measurement.
    """

    pid: int
    host: str
    port: int
    precondition: PreconditionDtype | None


class ParameterServer:
    """Owns parameters, previous update, damping, gamma and the accepted inverses."""

    def __init__(
        self, job: JobContext, devices: DevicePlan, host: str | None, timeout_seconds: float
    ) -> None:
        self._job = job
        self._devices = devices
        self._host = host or node_address()
        self._timeout_seconds = timeout_seconds
        self._group: Group | None = None
        self._log = role_log(job, "parameter_server", 0)

    def build(self, snapshot: Mapping[str, Array] | None) -> ServerReady:
        """Build the server, from a checkpoint's snapshot if there is one, and open its store."""
        torch.set_num_threads(1)
        self._built = logged(self._log, "build", lambda: self._build(snapshot))
        self._tcp_store = host_store(self._host, self._timeout_seconds)
        self._log.info("built", device=self._devices.kind, backend=self._devices.backend)
        return ServerReady(
            pid=os.getpid(),
            host=self._host,
            port=self._tcp_store.port,
            precondition=self._built.precondition,
        )

    def _build(self, snapshot: Mapping[str, Array] | None) -> BuiltServer:
        built = build_server(self._job, self._devices.device(), self._timeout_seconds)
        if snapshot is not None:
            built.server.restore(snapshot)
        return built

    def join(self, rendezvous: Rendezvous) -> None:
        """Join a group as its last rank and send it the parameters."""
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
        """Do the server's part of a step; leave the group on an error, so that nobody waits."""
        try:
            doing = f"step {order.plan.step}"
            return logged(self._log, doing, lambda: self._built.server.step(order))
        except Exception:
            if self._group is not None:
                self._group.leave()
            raise

    def averaged_parameters(self) -> Array | None:
        """Return the averaged parameters [P]; None while there are none."""
        return self._built.server.state.averaged()

    def snapshot(self) -> dict[str, Array]:
        """Return everything the next step depends on."""
        return self._built.server.snapshot()

    def checksum(self) -> str:
        """Return the checksum of what the gradient workers mirror."""
        return self._built.server.checksum()

    @ray.method(concurrency_group="mailbox")
    def accept(self, header: InverseHeader, parcel: InverseParcel) -> None:
        """Put the inverses of a layer where the next step finds them."""
        assert self._built.store is not None, "baselines have no inverses"
        self._built.store.accept(header, parcel)

    @ray.method(concurrency_group="control")
    def set_orphaned(self, layers: tuple[str, ...]) -> None:
        """Tell which layers nobody refreshes now; also reaches a step that waits."""
        if self._built.store is not None:
            self._built.store.set_orphaned(layers)

    @ray.method(concurrency_group="control")
    def status(self) -> int:
        """Return the process id."""
        return os.getpid()

    @ray.method(concurrency_group="lifeline")
    def lifeline(self) -> None:
        """Never return: the caller learns of this actor's death at once."""
        wait_forever()


ParameterServerActor = as_actor(ParameterServer, "mailbox", "control", "lifeline")
