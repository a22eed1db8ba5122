"""What a run has recorded of its own timing, which is all that its specification leaves open.

An inverse is used from the step on in which it has arrived, and made of the statistics and for the
gammas that its worker had by then. With both recorded the run can be done again to the last bit
(`kfac-dist replay`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

BeyondBound = Literal["damp", "degraded"]
"""How an inverse beyond the staleness bound was used: with heavier damping, or as it was."""


@dataclass(frozen=True, kw_only=True)
class InverseUse:
    """A version of a layer's inverse, made for `gammas` and used from `first_step` on."""

    first_step: int
    version_step: int
    gammas: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class RecordedInverses:
    """Which inverses a run has used.

    `uses` has the versions of each layer in the order of their steps; before the first of them its
    direction was the gradient. `beyond_bound` has the layers, by step, whose inverse was older than
    the bound.
    """

    uses: Mapping[str, Sequence[InverseUse]]
    beyond_bound: Mapping[int, Mapping[str, BeyondBound]]

    def version(self, step: int, layer: str) -> int:
        """Return the version of a layer in `step`, 0 where it had none."""
        uses = self.uses.get(layer, ())
        number = bisect_right(uses, step, key=lambda use: use.first_step)
        return uses[number - 1].version_step if number else 0

    def refresh(self, step: int) -> Mapping[str, tuple[float, ...]]:
        """Return the layers to be inverted with the statistics of `step`, and for which gammas."""
        return self._refreshes.get(step, {})

    def next_refresh(self, step: int) -> int | None:
        """Return the first step after `step` in which some layer is inverted, None after the last.

        Statistics of later steps must not be in the averages by then.
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
    """What is to be done as a run did it.

    At checkpoints and evaluations the workers share the buffers of a model, so these are done in
    the same steps.
    """

    inverses: RecordedInverses
    checkpoint_steps: frozenset[int]
    evaluation_steps: frozenset[int]
