"""The Ray cluster that a job runs on: an embedded one, one at an address, or one in use here."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from kfac_dist.config import WorkersSpec
from kfac_dist.coordination.jobs.placement import Room, machine_room, room_needed
from kfac_dist.errors import ConflictError, UnreachableError
from workers.cluster.daemons import daemons_awake
from workers.cluster.guard import guarded
from workers.cluster.interrupts import deferred
from workers.cluster.leftovers import marking
from workers.cluster.machine_load import describe_load
from workers.cluster.proxies import without_proxy
from workers.cluster.ray_internals import (
    cluster_id_of,
    free_agent_port,
    on_loopback,
    patient_start,
    quiet_stdout,
    use_token,
    whole_connection,
)

LOOPBACK = "127.0.0.1"
# If it is unset, Ray turns token authentication on in some of its commands and not in others.
_NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}
# Read by Ray's own processes when they start; by default Ray gives workers the lowest priority.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "10",  # for the current step, its checkpoint, and the last report
}
# Holds the factors and inverses of several steps; the paper's autoencoder has 13 MB of each in one.
_OBJECT_STORE_BYTES = 1_000_000_000
# On a crowded machine one of Ray's processes may miss one of Ray's own limits; a second start meets
# other luck.
_MOST_STARTS = 2
_LONGEST_CAUSE = 500
_QUIET = {"log_to_driver": False, "logging_level": logging.ERROR}

# Ray's stubs leave these untyped, and know no keyword arguments from a mapping.
_ray: Any = ray


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where workers are placed; `host` is None where each node has its own address.

    `may_have_other_nodes` is False where all processes can only be on the driver's machine.
    """

    room: Room
    host: str | None
    may_have_other_nodes: bool


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where drivers reach a cluster, and where its Jobs API is."""

    gcs: str
    jobs_url: str


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The attempt that a cluster is started for: its mark, empty without one, and its folder."""

    mark: str
    run_dir: Path | None


_NOBODY = Owner(mark="", run_dir=None)


@contextmanager
def ray_cluster(
    ray_address: str | None, room_for: WorkersSpec | None = None, owner: Owner = _NOBODY
) -> Iterator[Cluster]:
    """Yield a cluster, and take down after the block what was started for it.

    If this process has already initialised Ray, that cluster is used and left running. A cluster
    that is started here has as many CPUs as this machine, or as many as the workers in `room_for`
    need, if that is more: they then share the machine. All processes that have the owner's mark end
    with it.

    Raises:
        UnreachableError: no cluster answers at `ray_address`, or Ray does not start here.
    """
    if ray.is_initialized():
        is_single = _is_single_node()
        yield _describe(LOOPBACK if is_single else None, may_have_other_nodes=not is_single)
        return
    # A cluster that runs already has its own mode, which its drivers find in the environment.
    mode = {} if "RAY_AUTH_MODE" in os.environ and ray_address is not None else _NO_TOKEN
    with _environment(mode), quiet_stdout(), _started(ray_address, room_for, owner) as cluster:
        yield cluster


@contextmanager
def _started(
    ray_address: str | None, room_for: WorkersSpec | None, owner: Owner
) -> Iterator[Cluster]:
    if ray_address is not None:
        _init(f"no Ray cluster at {ray_address}", address=ray_address, **_QUIET)
        with _shut_down():
            yield _describe(None, may_have_other_nodes=not _is_on_loopback())
        return
    with _local(local_room(room_for), owner, include_dashboard=False):
        yield _describe(LOOPBACK, may_have_other_nodes=False)


@contextmanager
def head_cluster(token_path: Path) -> Iterator[Addresses]:
    """Yield a new cluster on this machine with the Jobs API, and take it down after the block.

    A caller needs the secret in `token_path` to reach it.

    Raises:
        UnreachableError: Ray does not start here.
    """
    # The server itself tries again with a new keeper.
    local = _local(
        local_room(), _NOBODY, most_starts=1, include_dashboard=True, dashboard_host=LOOPBACK
    )
    use_token(token_path)
    with _environment({}), quiet_stdout(), free_agent_port(), local as context:
        yield Addresses(
            gcs=context.address_info["gcs_address"], jobs_url=f"http://{context.dashboard_url}"
        )


def check_cluster(gcs_address: str | None, cluster_id: str) -> None:
    """Refuse to run a job on another cluster than the one that its server has asked.

    Raises:
        UnreachableError: no cluster answers at `gcs_address`.
        ConflictError: one with another id does.
    """
    if gcs_address is None:
        raise UnreachableError("Ray did not tell the driver where its cluster is")
    found = cluster_id_of(gcs_address)
    if found != cluster_id:
        raise ConflictError(
            f"the Ray cluster at {gcs_address} is not the one that the server gave this job to: "
            f"its id is {found}, not {cluster_id}. Another cluster runs on this host; nothing of "
            "the job was started there"
        )


@contextmanager
def _local(
    room: Room, owner: Owner, *, most_starts: int = _MOST_STARTS, **options: Any
) -> Iterator[Any]:
    """Start a cluster on this machine and yield Ray's own description of it.

    If it does not start, what there is of it is taken down, and it is tried again.
    """
    for tries_left in reversed(range(most_starts)):
        with ExitStack() as stack:
            try:
                context = _start(stack, room, owner, options)
            except UnreachableError:
                if not tries_left:
                    raise
                continue
            yield context
            return


def _start(stack: ExitStack, room: Room, owner: Owner, options: Mapping[str, Any]) -> Any:
    """Start a cluster once; `stack` takes down what was started, even if it fails."""
    # Paths of Unix sockets must be short, so the folder is near the root.
    folder = tempfile.mkdtemp(prefix="kfac-", dir="/tmp")
    stack.enter_context(guarded(Path(folder), owner.mark, owner.run_dir))
    stack.enter_context(_shut_down())
    with on_loopback(), patient_start(), marking(owner.mark), _terminal_kept_off():
        return _init(
            "Ray could not be started on this machine",
            address="local",
            num_cpus=room.num_cpus,
            resources={"inverse": room.num_inverse_slots},
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=folder,
            _node_ip_address=LOOPBACK,
            **_QUIET,
            **options,
        )


@contextmanager
def _terminal_kept_off() -> Iterator[None]:
    """Keep the signals of a terminal from the processes that are started inside the block.

    The quit key and the end of the terminal reach all its processes: the driver must keep
    those of Ray to end the job properly. Ray blocks SIGINT in them, not these. In this process
    they arrive after the block.
    """
    signals = {signal.SIGHUP, signal.SIGQUIT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _shut_down() -> Iterator[None]:
    try:
        yield
    finally:
        with daemons_awake(), deferred():
            ray.shutdown()


def _init(problem: str, **options: object) -> Any:
    try:
        with whole_connection():
            return _ray.init(**options)
    except SystemExit as ending:  # Ray's own handler of SIGTERM, in force while it starts
        raise KeyboardInterrupt from ending
    except Exception as error:
        # Ray raises a bare Exception when a process is late, and others when one cannot be forked.
        raise UnreachableError(f"{problem}: {_on_one_line(error)} ({describe_load()})") from error


def _on_one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_CAUSE else f"{text[:_LONGEST_CAUSE]}..."


def is_embedded(ray_address: str | None) -> bool:
    """Return whether `ray_cluster` would start a cluster on this machine."""
    return ray_address is None and not ray.is_initialized()


def local_room(room_for: WorkersSpec | None = None) -> Room:
    """Return the room that an embedded cluster would have, without starting it; no GPUs."""
    room = machine_room(len(os.sched_getaffinity(0)))
    if room_for is None:
        return room
    needed = room_needed(room_for)
    return replace(
        room,
        num_cpus=max(room.num_cpus, needed.num_cpus),
        num_inverse_slots=max(room.num_inverse_slots, needed.num_inverse_slots),
    )


def _describe(host: str | None, *, may_have_other_nodes: bool) -> Cluster:
    resources = _ray.cluster_resources()
    room = Room(
        num_cpus=int(resources.get("CPU", 0)),
        num_gpus=int(resources.get("GPU", 0)),
        num_inverse_slots=int(resources.get("inverse", 0)),
    )
    return Cluster(room=room, host=host, may_have_other_nodes=may_have_other_nodes)


def _is_single_node() -> bool:
    return len(_ray.nodes()) == 1


def _is_on_loopback() -> bool:
    """Return whether no other machine can reach the cluster, as with the one of a server."""
    return all(node["NodeManagerAddress"] == LOOPBACK for node in _ray.nodes())


@contextmanager
def _environment(mode: Mapping[str, str]) -> Iterator[None]:
    values = {**_ENVIRONMENT, **without_proxy(), **mode}
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
