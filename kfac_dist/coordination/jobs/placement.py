"""Whether the workers of a job fit on the machines."""

from __future__ import annotations

from typing import Protocol

from kfac_dist.errors import InvalidSpecError


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
        """CPU threads of a gradient worker; None is 1."""


def cpus_of(workers: WorkersSection) -> int:
    """Return how many CPUs the gradient workers of a job reserve: one for each of their threads."""
    return workers.gradient * (workers.threads or 1)


def check_placement(workers: WorkersSection, num_cpus: int, num_inverse_slots: int) -> None:
    """Accept workers for which there is room.

    A gradient worker takes as many CPUs as it has threads. An inverse worker takes one of
    `num_inverse_slots`, which is the number of CPUs unless the cluster says otherwise: it runs
    beside the gradient workers, in the time that they leave. The parameter server reserves nothing.

    Raises:
        InvalidSpecError: there are too few CPUs or slots; the message says how many are missing.
    """
    threads, needed = workers.threads or 1, cpus_of(workers)
    if needed > num_cpus:
        raise InvalidSpecError(
            f"workers.gradient: needs {_count(needed, 'CPU')} "
            f"({_count(workers.gradient, 'gradient worker')} x {_count(threads, 'thread')}), "
            f"this machine has {num_cpus}; {_most_that_fit(num_cpus, threads)}"
        )
    if workers.inverse > num_inverse_slots:
        raise InvalidSpecError(
            f"workers.inverse: needs room for {_count(workers.inverse, 'inverse worker')}, "
            f"this machine has room for {num_inverse_slots} (1 for each CPU)"
        )


def _most_that_fit(num_cpus: int, threads: int) -> str:
    most = num_cpus // threads
    if most == 0:
        return f"set workers.threads to at most {num_cpus}"
    return f"set it to at most {most}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
