"""Which layer does an inverse worker invert next? See docs/algorithm.md#asynchrony."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kfac_dist.coordination.checks import check_interval

RefreshPolicy = Literal["largest_drift", "oldest_first", "round_robin"]


@dataclass(frozen=True, kw_only=True)
class LayerRefreshState:
    """The state of one layer on which the choice depends."""

    name: str
    version: int | None
    """The step of the statistics in its newest inverse; None before the first inverse."""
    statistics_step: int
    """The step of the newest statistics in its averages; 0 before the first statistics."""
    drift: float
    """The relative change of its factors since its newest inverse."""
    cost: float
    """The cost of one inversion, in a unit that is the same for all layers."""

    def __post_init__(self) -> None:
        if self.version is not None:
            check_interval(f"version of {self.name}", self.version, 1)
        check_interval(f"statistics_step of {self.name}", self.statistics_step, 0)
        check_interval(f"drift of {self.name}", self.drift, 0)
        check_interval(f"cost of {self.name}", self.cost, 0)

    def is_due(self, requested_step: int) -> bool:
        """Return whether a newer inverse is requested and there are newer statistics for it."""
        version = self.version or 0
        return version < requested_step and version < self.statistics_step

    @property
    def drift_by_cost(self) -> float:
        """What an inversion gains for its cost; infinite for the first inverse of a layer."""
        if self.version is None:
            return float("inf")
        return self.drift / self.cost if self.cost > 0 else float("inf")


def choose_next(
    states: Sequence[LayerRefreshState],
    policy: RefreshPolicy,
    requested_step: int,
    last_chosen: str | None = None,
) -> str | None:
    """Return the name of the layer to invert next, None if no layer is due.

    A layer is due if its inverse is older than `requested_step` and newer statistics have come.
    Among the layers that are due, the policy chooses:

        round_robin    the next one after `last_chosen`, in the order of `states`
        oldest_first   the one with the smallest version
        largest_drift  the one with the largest drift divided by its cost

    The last two choose layers without an inverse first, and break ties by name.
    """
    if policy == "round_robin":
        states = _starting_after(states, last_chosen)
    due = [state for state in states if state.is_due(requested_step)]
    if not due:
        return None
    if policy == "oldest_first":
        return min(due, key=lambda state: (state.version or 0, state.name)).name
    if policy == "largest_drift":
        return min(due, key=lambda state: (-state.drift_by_cost, state.name)).name
    return due[0].name


def _starting_after(
    states: Sequence[LayerRefreshState], name: str | None
) -> Sequence[LayerRefreshState]:
    names = [state.name for state in states]
    if name not in names:
        return states
    after = names.index(name) + 1
    return [*states[after:], *states[:after]]
