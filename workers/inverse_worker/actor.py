"""The inverse worker as a Ray actor; the work is in `workers.inverse_worker.work`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping

import ray

from workers.actor import Handle, as_actor, logged, note_preemptions, own_gpu, role_log
from workers.device import DevicePlan
from workers.exchange.arrays import Array, Arrays
from workers.exchange.messages import (
    InverseMessage,
    InverseSetup,
    InverseStatus,
    JobContext,
    RefreshRequest,
    StatisticsHeader,
    StatisticsMessage,
)
from workers.exchange.parcels import StatisticsParcel
from workers.heartbeat import Pulse
from workers.inverse_worker.loop import InverseLoop
from workers.inverse_worker.work import InverseWork
from workers.planning import num_versions_used
from workers.this_node import on_this_node

_ARRIVAL_SECONDS = 10.0


class InverseWorker:
    """Owns the factors of its layers, averages them and inverts them at its own pace."""

    def __init__(
        self,
        job: JobContext,
        setup: InverseSetup,
        devices: DevicePlan,
        owners: Mapping[str, Handle],
        averages: Arrays | None,
    ) -> None:
        job = on_this_node(job)
        self._owners = owners
        self._kept: dict[str, deque[InverseMessage]] = {}  # by layer, for a new owner
        self._num_kept = num_versions_used(job.spec)
        self._sending = threading.Lock()
        # Steps do not wait for these versions, so a successor must be sure that they have arrived
        # if the averages contain later statistics.
        self._waits_for_arrival = bool(job.spec.staleness.delay_steps or job.replay_script)
        self._log = role_log(job, "inverse_worker", setup.rank)
        device = devices.inverse_device(setup.rank, own_gpu())
        self._loop = InverseLoop(InverseWork(job, setup, averages, device), self._publish)
        note_preemptions(self._loop.heartbeat)
        self._loop.start()
        layers = [layer.name for layer in setup.layers]
        self._log.info("started", layers=layers, device=str(device))

    def _publish(self, message: InverseMessage) -> None:
        header = message.header
        with self._sending:
            self._kept.setdefault(header.layer, deque(maxlen=self._num_kept)).append(message)
            sent = self._owners[header.layer].accept.remote(message)
        if self._waits_for_arrival:
            ray.wait([sent], timeout=_ARRIVAL_SECONDS)
        self._log.debug("inverted", layer=header.layer, version_step=header.version_step)
        for rung in header.rungs:
            self._log.warning("inversion_trouble", layer=header.layer, rung=rung)
        if None in header.pis:
            self._log.warning("inversion_failed", layer=header.layer, gammas=header.gammas)

    @ray.method(concurrency_group="mailbox")
    def update(self, header: StatisticsHeader, parcel: StatisticsParcel | None) -> None:
        """Put statistics into the mailbox."""
        self._loop.put_statistics(StatisticsMessage(header=header, parcel=parcel))

    @ray.method(concurrency_group="mailbox")
    def refresh(self, request: RefreshRequest) -> None:
        """Put a refresh request into the mailbox."""
        self._loop.put_request(request)

    @ray.method(concurrency_group="mailbox")
    def expect(self, steps: tuple[int, ...]) -> None:
        """Average these steps, which gradient workers send again, before any later one."""
        self._loop.expect(steps)

    @ray.method(concurrency_group="copies")
    def copy(self, least_step: int, timeout_seconds: float) -> dict[str, Array] | None:
        """Return the averages as they are; None if they lack the statistics of `least_step`."""
        return self._loop.copy(least_step, timeout_seconds)

    @ray.method(concurrency_group="control")
    def set_owners(self, owners: Mapping[str, Handle]) -> None:
        """Send inverses to these members from now on, and those that steps may use once more.

        A new owner of a shard may have it from a member that is gone, with its inverses.
        """
        with self._sending:
            self._owners = owners
            for name, messages in self._kept.items():
                for message in messages:
                    owners[name].accept.remote(message)

    def snapshot(self, step: int, timeout_seconds: float) -> dict[str, Array]:
        """Return the averages, once they contain the statistics of `step`."""
        return self._loop.snapshot(step, timeout_seconds)

    def reassign(self, setup: InverseSetup, averages: Arrays, timeout_seconds: float) -> None:
        """Own the layers of `setup` from now on; `averages` are of those that are new here."""
        self._loop.reassign(setup, averages, timeout_seconds)
        self._log.info("reassigned", layers=[layer.name for layer in setup.layers])

    @ray.method(concurrency_group="control")
    def status(self) -> InverseStatus:
        """Return the worker's health."""
        return self._loop.status()

    @ray.method(concurrency_group="heartbeat")
    def pulse(self) -> Pulse:
        """Return what this process is doing."""
        return self._loop.heartbeat.pulse()

    @ray.method(concurrency_group="lifeline")
    def lifeline(self) -> None:
        """Stay open as long as the worker lives; raise what ended its loop."""
        logged(self._log, "inverse loop", self._loop.lifeline)


InverseWorkerActor = as_actor(InverseWorker, "mailbox", "control", "copies", "lifeline")
