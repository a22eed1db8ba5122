"""The process of one inverse worker, as the driver holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import ray

from workers.actor import Handle, Ref, gpu_options
from workers.device import DevicePlan
from workers.exchange.arrays import Array
from workers.exchange.messages import InverseSetup, JobContext
from workers.inverse_worker.actor import InverseWorkerActor


@dataclass
class InverseProcess:
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

    def end(self, ended_as: str, why: str) -> None:
        """Kill it, unless that has been done."""
        if not self.ended_as:
            self.ended_as, self.why = ended_as, why
            ray.kill(self.handle)


def start_inverse_process(
    job: JobContext,
    setup: InverseSetup,
    devices: DevicePlan,
    owners: Mapping[str, Handle],
    averages: Mapping[str, Array],
) -> InverseProcess:
    """Start a worker, without waiting until it is there.

    Args:
        job: the job, as every actor receives it.
        setup: what it owns.
        devices: where it computes.
        owners: the member that has the shard of each layer, to which its inverses are sent.
        averages: the factors of its layers that it starts from.
    """
    gives_way = {"CUDA_MPS_CLIENT_PRIORITY": "1"} if devices.inverse_shares else {}
    gpu = gpu_options(devices.gpus_per_inverse_worker, **gives_way)
    options = InverseWorkerActor.options(num_cpus=0, resources={"inverse": 1}, **gpu)
    handle = options.remote(job, setup, devices, owners, averages)
    return InverseProcess(
        setup=setup,
        handle=handle,
        lifeline=handle.lifeline.remote(),
        first_status=handle.status.remote(),
    )
