"""Do the workers of a job fit on the machines? `Room` counts what there is and what they need."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

from kfac_dist.errors import InvalidSpecError, JobFailedError

NO_ROOM_REASON = "no_room"
"""Why an attempt ended that found less room than there was when its job was admitted."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """Room for workers: all that a cluster has, the part in use, or what a job needs.

    An inverse worker needs an inverse slot and no CPU: it runs beside the gradient workers, in the
    time that they leave.
    """

    num_cpus: int
    num_gpus: int
    num_inverse_slots: int

    def __add__(self, other: Room) -> Room:
        return Room(
            num_cpus=self.num_cpus + other.num_cpus,
            num_gpus=self.num_gpus + other.num_gpus,
            num_inverse_slots=self.num_inverse_slots + other.num_inverse_slots,
        )

    def exceeding(self, other: Room) -> list[str]:
        """Return the names of the fields that are larger here than in `other`."""
        return [
            field.name
            for field in fields(self)
            if getattr(self, field.name) > getattr(other, field.name)
        ]


_NOUNS = {"num_cpus": "CPU", "num_gpus": "GPU", "num_inverse_slots": "inverse worker"}

NO_ROOM = Room(num_cpus=0, num_gpus=0, num_inverse_slots=0)


class WorkersSection(Protocol):
    """The `workers` section of a job specification, as far as placement needs it."""

    @property
    def gradient(self) -> int:
        """The number of gradient workers."""

    @property
    def inverse(self) -> int:
        """The number of inverse workers."""

    @property
    def threads(self) -> int | None:
        """CPU threads of a gradient worker; None means 1."""

    @property
    def device(self) -> str:
        """`cuda` where a GPU is required."""

    @property
    def inverse_device(self) -> str:
        """`cuda` where inverse workers require a GPU."""


def machine_room(num_cpus: int) -> Room:
    """Return the room of a cluster on one machine: an inverse slot for each CPU, GPUs uncounted."""
    return Room(num_cpus=num_cpus, num_gpus=0, num_inverse_slots=num_cpus)


def room_needed(workers: WorkersSection) -> Room:
    """Return the room that the workers of a job reserve; the parameter server reserves nothing."""
    return Room(
        num_cpus=workers.gradient * (workers.threads or 1),
        # One is enough: all processes of a job may share it.
        num_gpus=1 if "cuda" in (workers.device, workers.inverse_device) else 0,
        num_inverse_slots=workers.inverse,
    )


def check_admitted(workers: WorkersSection, room: Room) -> None:
    """Raise if `room`, that of a cluster, has become too small for a job that was admitted to it.

    Raises:
        JobFailedError: it has, for example because a node died; its reason is `no_room`, after
            which the job waits in the queue again.
    """
    needed = room_needed(workers)
    if too_large := needed.exceeding(room):
        parts = [
            f"needs {_count(getattr(needed, name), noun)}, the cluster has {getattr(room, name)}"
            for name, noun in _NOUNS.items()
            if name in too_large
        ]
        raise JobFailedError(
            f"{'; '.join(parts)}; it had more when the job was admitted", reason=NO_ROOM_REASON
        )


def check_placement(workers: WorkersSection, room: Room, *, where: str = "this machine") -> None:
    """Raise if the CPUs or inverse slots of `room` are too few; GPUs are checked elsewhere.

    Args:
        workers: what the job asks for.
        room: the room that there is.
        where: whose room that is, in the message.

    Raises:
        InvalidSpecError: the workers do not fit; the message says how many would.
    """
    needed = room_needed(workers)
    if needed.num_cpus > room.num_cpus:
        threads = workers.threads or 1
        raise InvalidSpecError(
            f"workers.gradient: needs {_count(needed.num_cpus, 'CPU')} "
            f"({_count(workers.gradient, 'gradient worker')} x {_count(threads, 'thread')}), "
            f"{where} has {room.num_cpus}; {_largest_fit(room.num_cpus, threads)}"
        )
    if needed.num_inverse_slots > room.num_inverse_slots:
        # Only a cluster that is started here has one for each CPU.
        each = " (1 for each CPU)" if where == "this machine" else ""
        raise InvalidSpecError(
            f"workers.inverse: needs room for {_count(workers.inverse, 'inverse worker')}, "
            f"{where} has room for {room.num_inverse_slots}{each}"
        )


def _largest_fit(num_cpus: int, threads: int) -> str:
    most = num_cpus // threads
    if most == 0:
        return f"set workers.threads to at most {num_cpus}"
    return f"set it to at most {most}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
