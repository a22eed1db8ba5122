"""Which inverse did each step of a recorded run use?

A specification leaves only the timing of a run open: the step from which an inverse is used depends
on when it arrives, and its statistics and gammas on what its worker had received by then. A run
records both, and with them it can be repeated to the last bit (`kfac-dist replay`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

BeyondBound = Literal["damp", "degraded"]
"""How an inverse beyond the staleness bound was used: with heavier damping, or unchanged."""


@dataclass(frozen=True, kw_only=True)
class InverseUse:
    """A version of a layer's inverse, prepared for `gammas` and in use from `first_step` on."""

    first_step: int
    version_step: int
    gammas: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class RecordedInverses:
    """The inverses that a run has used."""

    uses: Mapping[str, Sequence[InverseUse]]
    """By layer, its versions in the order of their steps. Before the first one the layer's
    direction was the gradient."""
    beyond_bound: Mapping[int, Mapping[str, BeyondBound]]
    """By step, the layers whose inverse was older than the bound, and how it was used."""

    def version(self, step: int, layer: str) -> int:
        """Return the version that a layer used in `step`, 0 if it used none."""
        uses = self.uses.get(layer, ())
        number = bisect_right(uses, step, key=lambda use: use.first_step)
        return uses[number - 1].version_step if number else 0

    def refresh(self, step: int) -> Mapping[str, tuple[float, ...]]:
        """Return the layers to invert with the statistics of `step`, and the gammas for each."""
        return self._refreshes.get(step, {})

    def next_refresh(self, step: int) -> int | None:
        """Return the first step after `step` whose statistics are inverted, None after the last.

        Statistics of later steps must not enter the averages before that inversion.
        """
        number = bisect_right(self._refresh_steps, step)
        return self._refresh_steps[number] if number < len(self._refresh_steps) else None

    @cached_property
    def _refreshes(self) -> dict[int, dict[str, tuple[float, ...]]]:
        refreshes: dict[int, dict[str, tuple[float, ...]]] = {}
        for layer, uses in self.uses.items():
            for use in uses:
                refreshes.setdefault(use.version_step, {})[layer] = use.gammas
        return refreshes

    @cached_property
    def _refresh_steps(self) -> list[int]:
        return sorted(self._refreshes)


@dataclass(frozen=True, kw_only=True)
class ReplayScript:
    """What a replay must do exactly as the recorded run did it.

    This includes checkpoints and evaluations: at each of them the workers share the buffers of
    their models, which changes the steps that follow.
    """

    inverses: RecordedInverses
    checkpoint_steps: frozenset[int]
    evaluation_steps: frozenset[int]
    gradient_workers: Mapping[int, int] = field(default_factory=dict)
    """By step, the number of gradient workers from that step on, where it changed."""

    def ends_window(self, step: int) -> bool:
        """Return whether something has to be done between `step` and the next one."""
        return step in self.checkpoint_steps or step + 1 in self.gradient_workers

    @property
    def most_gradient_workers(self) -> int:
        """The largest number that it changes to, 0 if it never does."""
        return max(self.gradient_workers.values(), default=0)
