"""What the three kinds of Ray actors share: how they are declared, and their logs.

Actors are thin shells around the roles' work. Long work runs in one thread. Methods that must
answer during it, such as an inverse worker's `status`, have concurrency groups of their own. Ray
restarts no actor, because a restarted one would have lost its state without anybody noticing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

import ray
from structlog.typing import FilteringBoundLogger

from kfac_dist.errors import KfacDistError, NotFoundError
from kfac_dist.runs.logs import open_log, redirect_output
from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.tasks import enter_working_folder
from workers.exchange.messages import JobContext
from workers.this_node import bring_files

Handle: TypeAlias = Any
"""A Ray actor or its class; untyped, because Ray creates its methods at run time."""

Ref: TypeAlias = "ray.ObjectRef[Any]"
"""The pending or finished result of an actor call."""

T = TypeVar("T")

EXIT_EVENT = "os._exit was called"
"""The event in the log of a process that ended itself."""


def as_actor(role: type, *groups: str) -> Handle:
    """Return the actor class of a role, with one extra thread for each concurrency group."""
    # Ray's type stubs do not have concurrency groups.
    remote: Any = ray.remote
    options = {"max_restarts": 0, "num_cpus": 0, "concurrency_groups": dict.fromkeys(groups, 1)}
    return remote(**options)(role)


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


def enter_code_folder(job: JobContext) -> None:
    """Let this process work in the folder of the specification, where the user's files are.

    On a node other than the driver's, this folder and the data sets are brought there first.
    """
    bring_files(job)
    enter_working_folder(job.base_dir, otherwise=job.run_dir)


def logged(log: FilteringBoundLogger, doing: str, call: Callable[[], T]) -> T:
    """Log what `call` raises before passing it on; the user sees only the message."""
    try:
        return call()
    except KfacDistError as error:
        log.error(doing, error=error.message)
        raise
    except Exception:
        log.exception(doing)
        raise


def node_address() -> str:
    """Return the address of the machine that this actor runs on."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address
