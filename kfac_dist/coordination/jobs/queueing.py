"""Which waiting jobs may start now, and what the others wait for.

Higher priority first, then the older. A job that will never fit on this cluster holds up nobody;
one that does not fit now holds up those after it, or small jobs would keep it waiting forever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

# Without their names: it would change for the whole queue whenever a job starts.
_BEHIND = "jobs before it in the queue wait for room"
_UNITS = {
    "cpus": ("CPU", "CPUs"),
    "gpus": ("GPU", "GPUs"),
    "inverse_slots": ("inverse worker", "inverse workers"),
}


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a cluster has, or a job takes."""

    cpus: int
    gpus: int
    inverse_slots: int

    def __add__(self, other: Room) -> Room:
        return Room(
            cpus=self.cpus + other.cpus,
            gpus=self.gpus + other.gpus,
            inverse_slots=self.inverse_slots + other.inverse_slots,
        )

    def beyond(self, other: Room) -> list[str]:
        """Name each resource of which this is more than `other`."""
        return [
            field.name
            for field in fields(self)
            if getattr(self, field.name) > getattr(other, field.name)
        ]


NOTHING = Room(cpus=0, gpus=0, inverse_slots=0)


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A job in the queue; `number` is smaller for an older one."""

    job: str
    number: int
    priority: int
    needs: Room


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A job may start when `reason` is None; else a machine word and a sentence say why not."""

    job: str
    reason: str | None = None
    message: str | None = None


def admit(queue: Iterable[Waiting], cluster: Room, used: Room) -> list[Verdict]:
    """Judge the queue of a cluster of which `used` is taken, in the order of the queue."""
    verdicts: list[Verdict] = []
    is_blocked = False
    for waiting in sorted(queue, key=lambda waiting: (-waiting.priority, waiting.number)):
        if missing := waiting.needs.beyond(cluster):
            verdict = _refused(waiting, missing, cluster)
        elif is_blocked:
            verdict = Verdict(job=waiting.job, reason="waiting_for_turn", message=_BEHIND)
        elif taken := (used + waiting.needs).beyond(cluster):
            verdict = _no_room(waiting, taken, cluster, used)
            is_blocked = True
        else:
            verdict = Verdict(job=waiting.job)
            used += waiting.needs
        verdicts.append(verdict)
    return verdicts


def _refused(waiting: Waiting, names: Sequence[str], cluster: Room) -> Verdict:
    parts = [
        f"needs {_count(name, getattr(waiting.needs, name))}, "
        f"the cluster has {getattr(cluster, name)}"
        for name in names
    ]
    return Verdict(job=waiting.job, reason="insufficient_resources", message="; ".join(parts))


def _no_room(waiting: Waiting, names: Sequence[str], cluster: Room, used: Room) -> Verdict:
    parts = [
        f"needs {_count(name, getattr(waiting.needs, name))}, "
        f"{getattr(used, name)} of the cluster's {getattr(cluster, name)} are in use"
        for name in names
    ]
    return Verdict(job=waiting.job, reason="waiting_for_room", message="; ".join(parts))


def _count(name: str, number: int) -> str:
    one, many = _UNITS[name]
    return f"{number} {one if number == 1 else many}"
