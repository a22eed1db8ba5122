"""What the three kinds of Ray actors share: how they are declared, and their logs.

Actors are thin shells around the roles' work. Long work runs in one thread. Methods that must
answer during it, such as an inverse worker's `status`, have concurrency groups of their own. Ray
restarts no actor, because a restarted one would have lost its state without anybody noticing.
Each actor has a method `pulse` in the group `heartbeat` (`workers.heartbeat`).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

import ray
import torch
from structlog.typing import FilteringBoundLogger

from kfac_dist.errors import JobFailedError, KfacDistError, NotFoundError
from kfac_dist.runs.logs import open_log, redirect_output
from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.tasks import enter_working_folder
from workers.device import DEVICE_LOST_EXIT, DevicePlan, is_device_lost, visible_index
from workers.exchange.messages import JobContext
from workers.heartbeat import Heartbeat
from workers.this_node import bring_files

Handle: TypeAlias = Any
"""A Ray actor or its class; untyped, because Ray creates its methods at run time."""

Ref: TypeAlias = "ray.ObjectRef[Any]"
"""The pending or finished result of an actor call."""

T = TypeVar("T")

_OUT_OF_MEMORY = (
    "{}: the memory of the GPU is full: {} Use a smaller batch_size or more gradient workers, a "
    "smaller optimizer.max_factor_dim, or workers.inverse_device: cpu if inverse workers share the "
    "GPU"
)

EXIT_EVENT = "os._exit was called"
"""The event in the log of a process that ended itself."""


def as_actor(role: type, *groups: str) -> Handle:
    """Return the actor class of a role, with one extra thread for each concurrency group.

    The group `heartbeat` is always there.
    """
    # Ray's type stubs do not have concurrency groups.
    remote: Any = ray.remote
    threads = dict.fromkeys(("heartbeat", *groups), 1)
    options = {"max_restarts": 0, "num_cpus": 0, "concurrency_groups": threads}
    return remote(**options)(role)


def gpu_options(share: float, **environment: str) -> dict[str, Any]:
    """Return the options of an actor that reserves a share of a GPU; empty without one.

    Ray would hide the other GPUs from it, and with them the direct path between two GPUs, which
    NCCL uses. So it sees all, and computes on `own_gpu`.
    """
    if share == 0:
        return {}
    variables = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", **environment}
    return {"num_gpus": share, "runtime_env": {"env_vars": variables}}


def own_gpu() -> int | None:
    """Return the index of the GPU that this actor was given, among those that its process sees."""
    given = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    return visible_index(given, os.environ.get("CUDA_VISIBLE_DEVICES"))


def member_device(devices: DevicePlan) -> torch.device:
    """Return the device of this member of the group, and make it that of this thread."""
    device = devices.device(own_gpu())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def role_log(job: JobContext, role: str, rank: int) -> FilteringBoundLogger:
    """Open the log of this process's role; what the process prints goes to `.out` beside it.

    Both are files of this machine. The driver copies those of other nodes into the run folder.

    Raises:
        NotFoundError: the run folder was removed.
    """
    places = RunPlaces(job.run_dir)
    if not places.logs.is_dir():  # a run folder that was removed must not come back as a stump
        raise NotFoundError(f"{places.logs}: no such folder, so {role} {rank} has no place to log")
    # Ray would keep printed text in its own folder, which an embedded cluster removes at its end.
    path = places.log(role, rank, job.attempt)
    redirect_output(path)
    log = open_log(path, job=job.job, role=role, rank=rank, attempt=job.attempt, pid=os.getpid())
    _note_exit(log)
    return log


def _note_exit(log: FilteringBoundLogger) -> None:
    """Have the log say who calls `os._exit` in this process; Ray does not know the exit code."""
    leave, own = os._exit, os.getpid()

    def leave_with_a_note(status: int) -> NoReturn:
        if os.getpid() == own:  # processes that were forked end in the same way
            caller = sys._getframe(1)
            where = f"{caller.f_code.co_filename}:{caller.f_lineno}"
            log.error(EXIT_EVENT, status=status, where=where)
        leave(status)

    os._exit = leave_with_a_note


def note_preemptions(heartbeat: Heartbeat) -> None:
    """Have SIGTERM noted by the heartbeat, instead of ending the process.

    It is the notice of a machine, or of its owner, that the process will be ended. Ray itself ends
    its workers in other ways.
    """
    signal.signal(signal.SIGTERM, lambda _number, _frame: heartbeat.note_preemption())


def enter_code_folder(job: JobContext) -> None:
    """Let this process work in the folder of the specification, where the user's files are.

    On a node other than the driver's, this folder and the data sets are brought there first.
    """
    bring_files(job)
    enter_working_folder(job.base_dir, otherwise=job.run_dir)


def logged(log: FilteringBoundLogger, doing: str, call: Callable[[], T]) -> T:
    """Log what `call` raises before passing it on; the user sees only the message.

    If a GPU has reported an error, the process ends, and the driver starts another if it can.

    Raises:
        JobFailedError: the memory of the GPU is full.
    """
    try:
        return call()
    except KfacDistError as error:
        log.error(doing, error=error.message)
        raise
    except torch.OutOfMemoryError as error:
        log.exception(doing)
        message = _OUT_OF_MEMORY.format(doing, _first_line(error))
        raise JobFailedError(message, reason="gpu_memory") from error
    except Exception as error:
        log.exception(doing)
        if is_device_lost(error):
            os._exit(DEVICE_LOST_EXIT)
        raise


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def node_address() -> str:
    """Return the address of the machine that this actor runs on."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address
