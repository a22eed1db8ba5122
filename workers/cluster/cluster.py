"""The Ray cluster a job runs on: an embedded one, a given address, or what is already there."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from kfac_dist.config import WorkersSpec
from kfac_dist.coordination.jobs.placement import cpus_of
from kfac_dist.errors import UnreachableError
from workers.cluster.guard import guarded
from workers.cluster.ray_internals import (
    free_agent_port,
    on_loopback,
    patient_start,
    quiet_stdout,
    use_token,
    whole_connection,
)
from workers.interrupts import deferred

LOOPBACK = "127.0.0.1"
# Left unset, Ray turns token authentication on in some of its commands and not in others.
_NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}
# Read by Ray's own processes when they start; by itself it gives workers the lowest priority.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "10",  # for the step in hand, its checkpoint, and the farewell
}
# Factors and inverses of some steps; a job on the paper's autoencoder has 13 MB of each a step.
_OBJECT_STORE_BYTES = 1_000_000_000
_QUIET = {"log_to_driver": False, "logging_level": logging.ERROR}

# Ray's stubs leave these untyped, and know no keyword arguments from a mapping.
_ray: Any = ray


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What there is to place workers on; `host` is None where each node has its own address."""

    num_cpus: int
    num_gpus: int
    num_inverse_slots: int
    host: str | None


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where a cluster is reached: by drivers, and by its Jobs API."""

    gcs: str
    jobs_url: str


@contextmanager
def ray_cluster(ray_address: str | None, room_for: WorkersSpec | None = None) -> Iterator[Cluster]:
    """Give a cluster for the time of the block, and leave nothing of it behind.

    A Ray that this process has already initialised is used and left as it is. One that is started
    here has a CPU for each of this machine; `room_for` some workers it has more, if these need
    them, which then share the machine.

    Raises:
        UnreachableError: there is no cluster at `ray_address`, or Ray does not start here.
    """
    if ray.is_initialized():
        yield _describe(host=LOOPBACK if _is_single_node() else None)
        return
    # A cluster that is there has its own mode, which its drivers find in the environment.
    mode = {} if "RAY_AUTH_MODE" in os.environ and ray_address is not None else _NO_TOKEN
    with _environment(mode), quiet_stdout(), _started(ray_address, room_for) as cluster:
        yield cluster


@contextmanager
def _started(ray_address: str | None, room_for: WorkersSpec | None) -> Iterator[Cluster]:
    if ray_address is not None:
        _init(f"no Ray cluster at {ray_address}", address=ray_address, **_QUIET)
        with _shut_down():
            yield _describe(host=None)
        return
    with _local(local_cluster(room_for), include_dashboard=False):
        yield _describe(host=LOOPBACK)


@contextmanager
def head_cluster(token_path: Path) -> Iterator[Addresses]:
    """Give a cluster of this machine with the Jobs API inside the block, and leave nothing of it.

    Only who can read the secret in `token_path` can reach it.

    Raises:
        UnreachableError: Ray does not start here.
    """
    local = _local(local_cluster(), include_dashboard=True, dashboard_host=LOOPBACK)
    use_token(token_path)
    with _environment({}), quiet_stdout(), free_agent_port(), local as context:
        yield Addresses(
            gcs=context.address_info["gcs_address"], jobs_url=f"http://{context.dashboard_url}"
        )


@contextmanager
def _local(local: Cluster, **options: Any) -> Iterator[Any]:
    """Start a cluster on this machine; gives Ray's own description of it."""
    # Unix sockets have short names: the folder must be near the root.
    folder = tempfile.mkdtemp(prefix="kfac-", dir="/tmp")
    with guarded(Path(folder)), _shut_down():
        with on_loopback(), patient_start():
            context = _init(
                "Ray could not be started on this machine",
                address="local",
                num_cpus=local.num_cpus,
                resources={"inverse": local.num_inverse_slots},
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=folder,
                _node_ip_address=LOOPBACK,
                **_QUIET,
                **options,
            )
        yield context


@contextmanager
def _shut_down() -> Iterator[None]:
    try:
        yield
    finally:
        with deferred():
            ray.shutdown()


def _init(problem: str, **options: object) -> Any:
    try:
        with whole_connection():
            return _ray.init(**options)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise UnreachableError(f"{problem}: {error}") from error


def is_embedded(ray_address: str | None) -> bool:
    """Tell whether `ray_cluster` will start a cluster on this machine."""
    return ray_address is None and not ray.is_initialized()


def local_cluster(room_for: WorkersSpec | None = None) -> Cluster:
    """Return what an embedded cluster will have, without starting it; GPUs are not counted."""
    num_cpus = num_slots = len(os.sched_getaffinity(0))
    if room_for is not None:
        num_cpus = max(num_cpus, cpus_of(room_for))
        num_slots = max(num_slots, room_for.inverse)
    return Cluster(num_cpus=num_cpus, num_gpus=0, num_inverse_slots=num_slots, host=LOOPBACK)


def _describe(host: str | None) -> Cluster:
    resources = _ray.cluster_resources()
    return Cluster(
        num_cpus=int(resources.get("CPU", 0)),
        num_gpus=int(resources.get("GPU", 0)),
        num_inverse_slots=int(resources.get("inverse", 0)),
        host=host,
    )


def _is_single_node() -> bool:
    return len(_ray.nodes()) == 1


@contextmanager
def _environment(mode: Mapping[str, str]) -> Iterator[None]:
    values = {**_ENVIRONMENT, **mode}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
