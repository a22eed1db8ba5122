"""Gives a running job another number of inverse workers.

New workers start in the background while training continues. Then, between two steps, the layers
move that must: each present owner returns the averages of all statistics that were sent so far, the
new owner takes them over, and the gradient workers send what comes next to the new owner. So no
statistics are lost and none counts twice. A worker that leaves ends after that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from kfac_dist.coordination.steps.assignment import LayerCost
from workers.driver.crew.crew import Crew
from workers.exchange.arrays import Array
from workers.exchange.messages import InverseSetup
from workers.planning import rescaled_setups

# Ray's stubs leave much untyped.
_ray: Any = ray


@dataclass(frozen=True, kw_only=True)
class Rescaled:
    """Layers have moved: which, and the ranks of the workers whose layers are others now."""

    num_workers: int
    moved: tuple[str, ...]
    changed: tuple[int, ...]


class InverseScaling:
    """Brings a crew to the number of inverse workers that was asked for last.

    `layers` are all layers, in the order of the model; `num_workers` was asked for at the start.
    """

    def __init__(self, layers: Sequence[LayerCost], num_workers: int) -> None:
        self._layers = layers
        self._reached = num_workers

    def advance(
        self, crew: Crew, wished: int, step: int, statistics_step: int
    ) -> Rescaled | str | None:
        """Do what can be done before `step` without waiting for a process to start.

        Returns what has moved, why the crew cannot come to that number now, or None if there is
        nothing to tell.

        Args:
            crew: the actors, between two steps.
            wished: the number of inverse workers.
            step: the next step.
            statistics_step: the newest step that computed statistics.
        """
        pool = crew.inverse_pool
        if wished == self._reached:
            if pool.num_joining:
                pool.join({})  # the wish was withdrawn
            return None
        if not pool.setups or not pool.is_whole:
            return None
        setups = rescaled_setups(pool.setups, self._layers, wished, statistics_step)
        joining = {rank: setup for rank, setup in setups.items() if rank not in pool.setups}
        if missing := _missing(len(joining) - pool.num_joining):
            return missing
        if not pool.join(joining):
            return None
        moved = _moved(pool.assignment, setups)
        changed = tuple(rank for rank, own in setups.items() if pool.setups.get(rank) != own)
        # Also of those that only gain layers: copies of all layers of a worker are of one step.
        asked = {*moved.values(), *(rank for rank in changed if rank in pool.setups)}
        averages = averages_of(crew, asked, statistics_step)
        if averages is None:  # a worker has died: its successor comes first
            return None
        pool.averages.keep(averages)
        # One that dies meanwhile has a successor like any other.
        crew.gather_optional(pool.hand_over(setups, step, crew.group_timeout_seconds))
        crew.connect_inverse_workers()
        self._reached = wished
        return Rescaled(num_workers=len(setups), moved=tuple(moved), changed=changed)


def _moved(
    present: Mapping[int, Sequence[str]], setups: Mapping[int, InverseSetup]
) -> dict[str, int]:
    """Return the layers that move, and the rank of the present owner of each."""
    owner = {name: rank for rank, names in present.items() for name in names}
    return {
        layer.name: owner[layer.name]
        for rank, setup in setups.items()
        for layer in setup.layers
        if owner[layer.name] != rank
    }


def _missing(num_starting: int) -> str | None:
    """Return what is missing to start this many workers, None if they have room."""
    if num_starting <= 0:
        return None
    free = int(_ray.available_resources().get("inverse", 0))
    if free >= num_starting:
        return None
    return f"{num_starting} more inverse workers need as many 'inverse' resources, {free} are free"


def averages_of(
    crew: Crew, ranks: Collection[int], statistics_step: int
) -> dict[str, Array] | None:
    """Return the averages of the inverse workers of these ranks; None if one has died.

    They contain the statistics up to `statistics_step`.
    """
    snapshots = crew.inverse_pool.snapshots(statistics_step, crew.group_timeout_seconds)
    asked = {ref: member for ref, member in snapshots.items() if member.rank in ranks}
    parts = crew.gather_optional(asked)
    if len(parts) < len(asked):
        return None
    return {name: array for part in parts for name, array in part.items()}


def replace_preempted(crew: Crew, rank: int, statistics_step: int) -> None:
    """Replace an inverse worker that will be ended; its averages are kept for its successor."""
    averages = averages_of(crew, [rank], statistics_step)
    crew.inverse_pool.averages.keep(averages or {})
    crew.inverse_pool.end_preempted(rank)
