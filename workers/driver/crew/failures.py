"""From what Ray reports to the one cause a user is shown.

When a process dies, the others' collectives fail as well: those errors are echoes. So a failure
is judged together with what follows within a moment.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from kfac_dist.errors import (
    FirstFailure,
    JobFailedError,
    KfacDistError,
    WorkerDiedError,
)
from workers.actor import Ref
from workers.exchange.process_group import PeerLostError

_SETTLE_SECONDS = 5.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Member:
    """An actor of the job, by role and rank; `pid` is 0 before it is known."""

    role: str
    rank: int
    pid: int = 0

    def __str__(self) -> str:
        return f"{self.role.replace('_', ' ')} {self.rank}"


def unwrap(error: BaseException) -> BaseException:
    """Return what was raised in the actor, without Ray's wrapping."""
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return error


def failure_of(ref: Ref) -> BaseException | None:
    """Return what a finished call raised, None when it returned."""
    try:
        ray.get(ref)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is judged by the caller
        return unwrap(error)
    return None


def failed_among(calls: Mapping[Ref, T]) -> dict[Ref, T]:
    """Return those of the finished `calls` that raised."""
    try:
        ray.get(list(calls))
    except Exception:  # noqa: BLE001 - whatever it is, it is judged by the caller
        return {ref: owner for ref, owner in calls.items() if failure_of(ref) is not None}
    return {}


def finished(refs: Iterable[Ref]) -> list[Ref]:
    """Return those of `refs` that have ended by now."""
    asked = list(refs)
    if not asked:
        return []
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=0)
    return list(ready)


def is_death(error: BaseException) -> bool:
    """Tell whether the process of the actor is gone."""
    return isinstance(error, RayActorError)


def first_cause(
    failed: Mapping[Ref, Member], pending: Mapping[Ref, Member]
) -> tuple[Member, BaseException]:
    """Return the member that failed first and its error.

    `failed` are calls that have raised, `pending` those still open in other actors: when all of
    `failed` are echoes, the cause is waited for among them.
    """
    seen = dict(failed)
    waiting = dict(pending)
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        found = [(member, error) for ref, member in seen.items() if (error := failure_of(ref))]
        real = [pair for pair in found if not isinstance(pair[1], PeerLostError)]
        deaths = [pair for pair in real if is_death(pair[1])]
        left = deadline - time.monotonic()
        if real or not waiting or left <= 0:
            return (deaths or real or found)[0]
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
        for ref in ready:
            seen[ref] = waiting.pop(ref)


def job_error(member: Member, error: BaseException, *, step: int, log_tail: str) -> KfacDistError:
    """Return the error that ends the job for what `member` raised."""
    first = FirstFailure(
        role=member.role, rank=member.rank, time_seconds=time.time(), log_tail=log_tail
    )
    if isinstance(error, JobFailedError):
        error.first_failure = error.first_failure or first
        return error
    if isinstance(error, KfacDistError):
        return error
    if is_death(error):
        return WorkerDiedError(
            f"{member} (pid {member.pid}) died at step {step}; the job cannot go on without it",
            first_failure=first,
        )
    if isinstance(error, PeerLostError):
        return JobFailedError(
            f"{member} lost its peers at step {step}: {_first_line(error)}",
            reason="peers_lost",
            first_failure=first,
        )
    return JobFailedError(
        f"{member} failed at step {step}: {type(error).__name__}: {_first_line(error)}",
        reason="worker_failed",
        first_failure=first,
    )


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines() or [repr(error)]
    return lines[0]
