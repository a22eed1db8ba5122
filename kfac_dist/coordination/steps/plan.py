"""What is due in a step? All periods of the algorithm are counted here and nowhere else.

The driver plans each step and sends the plan to all actors. The serial optimizer makes its own plan
with the same rules. See docs/algorithm.md#schedules.
"""

from __future__ import annotations

from dataclasses import dataclass

from kfac_dist.coordination.steps.schedule import Schedule

# The paper refreshes the inverses in each of the first three steps (docs/algorithm.md#schedules).
_FIRST_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The work that is due in one step; steps count from 1."""

    step: int
    update_factors: bool
    """Statistics are computed and averaged into the factors."""
    refresh_inverses: bool
    """The averaged factors are inverted again."""
    search_gamma: bool
    """Three candidates for gamma are compared (docs/algorithm.md#gamma)."""
    measure: bool
    """The objective is computed again after the update, for the reduction ratio
    (docs/algorithm.md#damping)."""
    lr: float | None = None
    """The learning rate; None if the step rule has none."""
    damping: float | None = None
    """The damping that a schedule gives; None without a schedule."""


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """The periods in steps, None for an adaptation that is off, and scheduled values.

    `lr` is None if the step rule has no learning rate, `damping` without a schedule.
    """

    factor_update_period: int
    inverse_update_period: int
    gamma_adapt_period: int | None
    damping_adapt_period: int | None
    lr: float | Schedule | None = None
    damping: float | Schedule | None = None

    def plan(self, step: int) -> StepPlan:
        """Return what is due in `step`, counted from 1."""
        refresh = self._refreshes(step)
        return StepPlan(
            step=step,
            update_factors=refresh or (step - 1) % self.factor_update_period == 0,
            refresh_inverses=refresh,
            search_gamma=_due(step, self.gamma_adapt_period),
            measure=_due(step, self.damping_adapt_period),
            lr=_value_at(step, self.lr),
            damping=_value_at(step, self.damping),
        )

    def next_refresh(self, step: int) -> int:
        """Return the first step after `step` in which a refresh is due."""
        step += 1
        while not self._refreshes(step):
            step += 1
        return step

    def last_refresh(self, step: int) -> int:
        """Return the newest step up to `step` in which a refresh was due."""
        while not self._refreshes(step):
            step -= 1
        return step

    def _refreshes(self, step: int) -> bool:
        return (
            step <= _FIRST_STEPS
            or _due(step, self.inverse_update_period)
            or _due(step, self.gamma_adapt_period)
        )


def _due(step: int, period: int | None) -> bool:
    return period is not None and step % period == 0


def _value_at(step: int, value: float | Schedule | None) -> float | None:
    return value.value(step) if isinstance(value, Schedule) else value
