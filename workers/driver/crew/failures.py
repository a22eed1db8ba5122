"""Finds, among the errors that Ray reports, the one cause to show to the user.

When a process dies, the collectives of the others fail as well. Those errors are *echoes*. So a
failure is judged together with the failures that follow within a moment.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
from workers.driver.crew.deaths import named, pid_of, tails, why_it_died
from workers.exchange.process_group import PeerLostError

_SETTLE_SECONDS = 5.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Member:
    """An actor of the job, by role and rank; `pid` is 0 while it is unknown."""

    role: str
    rank: int
    pid: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.role.replace('_', ' ')} {self.rank}"


class MemberLostError(Exception):
    """A member of the group is gone, or its connections are; `cause` is what a user would see.

    `member` is None if nobody is to blame.
    """

    def __init__(self, member: Member | None, cause: KfacDistError) -> None:
        super().__init__(cause.message)
        self.member = member
        self.cause = cause


def unwrap(error: BaseException) -> BaseException:
    """Return the error that was raised in the actor, without Ray's wrapping."""
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return error


def failure_of(ref: Ref) -> BaseException | None:
    """Return the error that a finished call raised, None if it returned."""
    try:
        ray.get(ref)
    except Exception as error:  # noqa: BLE001 - the caller judges it
        return unwrap(error)
    return None


def failed_among(calls: Mapping[Ref, T]) -> dict[Ref, T]:
    """Return the calls that raised an error; all `calls` have finished."""
    try:
        ray.get(list(calls))
    except Exception:  # noqa: BLE001 - the caller judges it
        return {ref: owner for ref, owner in calls.items() if failure_of(ref) is not None}
    return {}


def finished(refs: Iterable[Ref]) -> list[Ref]:
    """Return the calls among `refs` that have ended by now."""
    asked = list(refs)
    if not asked:
        return []
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=0)
    return list(ready)


def is_death(error: BaseException) -> bool:
    """Return whether the error says that the process of the actor is gone."""
    return isinstance(error, RayActorError)


def first_cause(
    failed: Mapping[Ref, Member], pending: Mapping[Ref, Member]
) -> tuple[Member, BaseException]:
    """Return the member that caused the failure, and its error.

    `failed` are calls that have raised, `pending` calls still open in other actors. If all of
    `failed` are echoes, the cause is still to come: wait for it among `pending`.
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


def job_error(member: Member, error: BaseException, *, step: int, log: Path) -> KfacDistError:
    """Return the error that ends the job, given what `member` raised; `log` is its log."""
    first = FirstFailure(
        role=member.role, rank=member.rank, time_seconds=time.time(), log_tail=tails(log)
    )
    if isinstance(error, JobFailedError):
        error.first_failure = error.first_failure or first
        return error
    if isinstance(error, KfacDistError):
        return error
    if is_death(error):
        return WorkerDiedError(
            f"{named(str(member), pid_of(error, member.pid))} died at step {step}; the job cannot "
            f"continue without it; {why_it_died(log)}",
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


def stall_error(member: Member, why: str, *, step: int, log: Path) -> WorkerDiedError:
    """Return the error of a job that has killed `member` because it did not advance."""
    return WorkerDiedError(
        f"{named(str(member), member.pid or None)} stalled at step {step} and was killed: {why}",
        first_failure=FirstFailure(
            role=member.role, rank=member.rank, time_seconds=time.time(), log_tail=tails(log)
        ),
    )


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines() or [repr(error)]
    return lines[0]
