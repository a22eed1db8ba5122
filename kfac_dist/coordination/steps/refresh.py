"""What an inverse worker inverts next (algorithm.md section 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kfac_dist.coordination.checks import check_interval

RefreshPolicy = Literal["largest_drift", "oldest_first", "round_robin"]


@dataclass(frozen=True, kw_only=True)
class LayerRefreshState:
    """What the choice depends on, for one layer.

    `version`: the step of the statistics in its newest inverse, None before the first.
    `statistics_step`: the step of the newest statistics in its averages, 0 before the first.
    `drift`: relative change of the factors since that inverse. `cost`: of one inversion, in any
    unit that is the same for all layers.
    """

    name: str
    version: int | None
    statistics_step: int
    drift: float
    cost: float

    def __post_init__(self) -> None:
        if self.version is not None:
            check_interval(f"version of {self.name}", self.version, 1)
        check_interval(f"statistics_step of {self.name}", self.statistics_step, 0)
        check_interval(f"drift of {self.name}", self.drift, 0)
        check_interval(f"cost of {self.name}", self.cost, 0)

    def is_due(self, requested_step: int) -> bool:
        """Tell whether a new inverse is asked for and there is something new to put into it."""
        version = self.version or 0
        return version < requested_step and version < self.statistics_step

    @property
    def drift_by_cost(self) -> float:
        """What an inversion gains for its price; the first inverse of a layer gains the most."""
        if self.version is None:
            return float("inf")
        return self.drift / self.cost if self.cost > 0 else float("inf")


def choose_next(
    states: Sequence[LayerRefreshState],
    policy: RefreshPolicy,
    requested_step: int,
    last_chosen: str | None = None,
) -> str | None:
    """Return the layer to invert next; None when there is nothing to do.

    A layer is a candidate when its inverse is older than `requested_step` and newer statistics
    have come. `round_robin` takes the next one in the order of `states` after `last_chosen`,
    `oldest_first` the smallest version, `largest_drift` the largest drift for its cost; layers
    without any inverse come first in the last two, and equals in the order of their names.
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
