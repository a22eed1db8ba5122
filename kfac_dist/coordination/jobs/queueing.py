"""Which queued jobs may start now, and what do the others wait for?

Higher priority goes first, then the older job. A job that does not fit now blocks those behind it;
otherwise small jobs could keep a large one waiting forever. A job that is larger than the whole
cluster blocks nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kfac_dist.coordination.jobs.placement import Room

# Names no jobs: a list of names would change for the whole queue whenever a job starts.
_BEHIND = "jobs before it in the queue wait for room"
_INVERSE_SLOTS = (
    "; each inverse worker takes 1 of Ray's resource `inverse`, which a node has if it is started "
    "with ray start --resources='{\"inverse\": N}'"
)
_NOUNS = {
    "num_cpus": ("CPU", "CPUs"),
    "num_gpus": ("GPU", "GPUs"),
    "num_inverse_slots": ("inverse worker", "inverse workers"),
}


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A job in the queue; an older job has a smaller `number`."""

    job: str
    number: int
    priority: int
    needs: Room


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a job may start: yes if `reason` is None.

    Otherwise `reason` is a machine-readable word and `message` a sentence for people.
    """

    job: str
    reason: str | None = None
    message: str | None = None


def admit_jobs(queue: Iterable[Waiting], cluster: Room, used: Room) -> list[Verdict]:
    """Return a verdict for each job, in the order of the queue.

    Args:
        queue: the waiting jobs, in any order.
        cluster: all the room of the cluster.
        used: the part of it that active jobs occupy.
    """
    verdicts: list[Verdict] = []
    is_blocked = False
    for waiting in sorted(queue, key=lambda waiting: (-waiting.priority, waiting.number)):
        if too_large := waiting.needs.exceeding(cluster):
            verdict = _never_fits(waiting, too_large, cluster)
        elif is_blocked:
            verdict = Verdict(job=waiting.job, reason="waiting_for_turn", message=_BEHIND)
        elif occupied := (used + waiting.needs).exceeding(cluster):
            verdict = _fits_later(waiting, occupied, cluster, used)
            is_blocked = True
        else:
            verdict = Verdict(job=waiting.job)
            used += waiting.needs
        verdicts.append(verdict)
    return verdicts


def _never_fits(waiting: Waiting, names: Sequence[str], cluster: Room) -> Verdict:
    parts = [
        f"needs {_count(name, getattr(waiting.needs, name))}, "
        f"the cluster has {getattr(cluster, name)}"
        for name in names
    ]
    message = "; ".join(parts)
    if "num_inverse_slots" in names:
        message += _INVERSE_SLOTS
    return Verdict(job=waiting.job, reason="insufficient_resources", message=message)


def _fits_later(waiting: Waiting, names: Sequence[str], cluster: Room, used: Room) -> Verdict:
    parts = [
        f"needs {_count(name, getattr(waiting.needs, name))}, "
        f"{getattr(used, name)} of the cluster's {getattr(cluster, name)} are in use"
        for name in names
    ]
    return Verdict(job=waiting.job, reason="waiting_for_room", message="; ".join(parts))


def _count(name: str, number: int) -> str:
    singular, plural = _NOUNS[name]
    return f"{number} {singular if number == 1 else plural}"
