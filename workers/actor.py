"""What the three kinds of Ray actors share: how they are declared, and their logs.

Actors are thin shells around the roles' work. Long work runs in one thread; `status` and
`lifeline` have concurrency groups of their own and always answer. No actor is restarted by Ray:
its state would be lost without a word.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import ray
from structlog.typing import FilteringBoundLogger

from kfac_dist.errors import KfacDistError
from kfac_dist.runs.folder import RunFolder
from kfac_dist.runs.logs import open_log
from workers.exchange.messages import JobContext

Handle: TypeAlias = Any
"""A Ray actor, or its class; Ray makes its methods at run time."""

Ref: TypeAlias = "ray.ObjectRef[Any]"
"""A call of an actor that has been made."""

T = TypeVar("T")


def as_actor(role: type, *groups: str) -> Handle:
    """Return the actor class of a role, with one thread for each of the concurrency `groups`."""
    # Ray's stubs do not know concurrency groups.
    remote: Any = ray.remote
    options = {"max_restarts": 0, "num_cpus": 0, "concurrency_groups": dict.fromkeys(groups, 1)}
    return remote(**options)(role)


def role_log(job: JobContext, role: str, rank: int) -> FilteringBoundLogger:
    """Open the log of this process's role; what the process prints goes beside it, to `.out`.

    Ray keeps printed text in its own folder, which an embedded cluster takes with it.
    """
    places = RunFolder.open(job.run_dir).places
    with places.printed(role, rank, job.attempt).open("ab") as printed:
        os.dup2(printed.fileno(), sys.stdout.fileno())
        os.dup2(printed.fileno(), sys.stderr.fileno())
    path = places.log(role, rank, job.attempt)
    return open_log(path, job=job.job, role=role, rank=rank, attempt=job.attempt, pid=os.getpid())


def logged(log: FilteringBoundLogger, doing: str, call: Callable[[], T]) -> T:
    """Log what `call` raises, in full; the user is shown the message only."""
    try:
        return call()
    except KfacDistError as error:
        log.error(doing, error=error.message)
        raise
    except Exception:
        log.exception(doing)
        raise


def wait_forever() -> None:
    """Keep a call open, so that the caller learns of this actor's death at once."""
    threading.Event().wait()


def node_address() -> str:
    """Return the address of the machine that this actor runs on."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address
