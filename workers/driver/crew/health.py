"""Which members answer, what are they doing, and whose work hangs?

One heartbeat for all roles (`workers.heartbeat`). The driver has one thread, so it never waits for
an answer: it asks now and reads the answer later. A member that does not answer for `stall_seconds`
is *stopped*; one that answers, but whose own work does not advance for `step_seconds`, *hangs*. A
member that waits for others is never to blame.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray

from kfac_dist.config.job import FaultSpec
from workers.actor import Handle, Ref
from workers.driver.crew.failures import Member, failed_among, finished
from workers.exchange.messages import InverseStatus
from workers.heartbeat import IDLE, Pulse

_PERIOD_SECONDS = 1.0  # between two questions to one member
_SPARE_SECONDS = 30.0
_ABSENT_SECONDS = 2.0


def patience_seconds(faults: FaultSpec) -> float:
    """Return how long members wait for each other: longer than it takes to find the culprit."""
    return max(faults.stall_seconds, faults.step_seconds) + _SPARE_SECONDS


@dataclass(frozen=True, kw_only=True)
class Stall:
    """A member that does not advance, and how that was noticed, as the rest of a sentence."""

    member: Member
    why: str


@dataclass(frozen=True, kw_only=True)
class _Question:
    member: Member
    asked_seconds: float  # of the monotonic clock, as all times here


class Health:
    """Asks members for their pulse, and judges the answers by the limits in `faults`."""

    def __init__(self, faults: FaultSpec) -> None:
        self._faults = faults
        self._open: dict[Ref, _Question] = {}
        self._asked: dict[Member, float] = {}
        self._pulses: dict[Member, Pulse] = {}
        self._judged_seconds = time.monotonic()

    def ask(self, members: Mapping[Member, Handle]) -> None:
        """Ask each member, unless it was asked a moment ago or a question to it is still open.

        Those that were members before are forgotten.
        """
        self._keep(members)
        now = time.monotonic()
        waiting = {question.member for question in self._open.values()}
        for member, handle in members.items():
            asked = self._asked.get(member)
            if member in waiting or (asked is not None and now - asked < _PERIOD_SECONDS):
                continue
            self._asked[member] = now
            self._open[handle.pulse.remote()] = _Question(member=member, asked_seconds=now)

    def _keep(self, members: Mapping[Member, Handle]) -> None:
        for member in [member for member in self._asked if member not in members]:
            self.forget(member)

    def pulses(self) -> dict[Member, Pulse]:
        """Return the newest answer of each member."""
        read_answers(self._open, self._pulses, lambda question: question.member)
        return dict(self._pulses)

    def stalls(self) -> list[Stall]:
        """Return the members that are stopped or hang, the longest first.

        A member that has never answered is still starting, which is not judged here.
        """
        pulses = self.pulses()
        now = time.monotonic()
        if now - self._judged_seconds > _ABSENT_SECONDS:
            # This process was stopped itself, or busy; what has come meanwhile is read next time.
            self._open = {
                ref: replace(question, asked_seconds=now) for ref, question in self._open.items()
            }
        self._judged_seconds = now
        found: list[tuple[float, Stall]] = []
        for question in self._open.values():
            seconds = now - question.asked_seconds
            if seconds > self._faults.stall_seconds and question.member in pulses:
                found.append((seconds, Stall(member=question.member, why=self._silent(seconds))))
        for member, pulse in pulses.items():
            if _works(pulse) and pulse.seconds > self._faults.step_seconds:
                found.append((pulse.seconds, Stall(member=member, why=self._hangs(pulse))))
        return [stall for _, stall in sorted(found, key=lambda pair: -pair[0])]

    def _silent(self, seconds: float) -> str:
        return (
            f"its process did not answer for {seconds:.0f} s, as when it is stopped; "
            f"faults.stall_seconds is {self._faults.stall_seconds:g}"
        )

    def _hangs(self, pulse: Pulse) -> str:
        return (
            f"its process answers, but its work, '{pulse.doing}', did not advance for "
            f"{pulse.seconds:.0f} s; faults.step_seconds is {self._faults.step_seconds:g}"
        )

    def suspect(self, least_seconds: float = 5.0) -> Stall | None:
        """Return who most likely holds the others up, below the limits as well; None if nobody.

        Silence is a stronger sign than long work.
        """
        pulses, now = self.pulses(), time.monotonic()
        silent = [
            (now - question.asked_seconds, question.member) for question in self._open.values()
        ]
        longest = max(silent, key=lambda pair: pair[0], default=(0.0, None))
        if longest[1] is not None and longest[0] >= least_seconds:
            return Stall(member=longest[1], why=self._silent(longest[0]))
        working = {m: p for m, p in pulses.items() if _works(p) and p.seconds >= least_seconds}
        if not working:
            return None
        member = max(working, key=lambda member: working[member].seconds)
        return Stall(member=member, why=self._hangs(working[member]))

    def preempted(self) -> list[Member]:
        """Return the members that have had notice that they will be ended."""
        return [
            replace(member, pid=pulse.pid)
            for member, pulse in self.pulses().items()
            if pulse.preempted
        ]

    def forget(self, member: Member) -> None:
        """Forget the questions to a member that is gone, and its answers."""
        self._pulses.pop(member, None)
        self._asked.pop(member, None)
        self._open = {ref: q for ref, q in self._open.items() if q.member != member}


def _works(pulse: Pulse) -> bool:
    return pulse.doing != IDLE and not pulse.waits


def read_answers(open_calls: dict[Ref, Any], newest: dict[Any, Any], key: Any) -> None:
    """Move the answers of the `open_calls` that have ended to `newest`, by `key(question)`."""
    ended = {ref: open_calls.pop(ref) for ref in finished(open_calls)}
    failed = failed_among(ended)
    answered = {ref: key(question) for ref, question in ended.items() if ref not in failed}
    newest |= dict(zip(answered.values(), ray.get(list(answered)), strict=True))


class InverseStatuses:
    """The newest status of each inverse worker, by rank; asks without waiting for the answers."""

    def __init__(self) -> None:
        self._open: dict[Ref, int] = {}
        self._newest: dict[int, InverseStatus] = {}

    def ask(self, workers: Mapping[int, Handle]) -> None:
        """Ask each worker for its status, unless a question to it is still open."""
        waiting = set(self._open.values())
        for rank, handle in workers.items():
            if rank not in waiting:
                self._open[handle.status.remote()] = rank

    def newest(self) -> dict[int, InverseStatus]:
        """Return the newest answer of each worker."""
        read_answers(self._open, self._newest, lambda rank: rank)
        return dict(self._newest)

    def forget(self, rank: int) -> None:
        """Forget the questions and answers of a worker that is gone."""
        self._newest.pop(rank, None)
        self._open = {ref: asked for ref, asked in self._open.items() if asked != rank}
