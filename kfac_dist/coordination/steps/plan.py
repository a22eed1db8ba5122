"""What is due in a step: every period of the algorithm is counted here and nowhere else.

The driver plans a step and sends the plan to all actors; the serial optimizer plans its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from kfac_dist.coordination.steps.schedule import Schedule

# The paper refreshes the inverses in each of the first three steps (algorithm.md section 11).
_FIRST_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The work of one step; steps count from 1.

    `update_factors`: statistics are computed and averaged. `refresh_inverses`: the factors are
    inverted anew. `search_gamma`: with three candidates for gamma. `measure`: the objective is
    computed again after the update, for the reduction ratio. `lr` is None where the optimizer has
    none, `damping` where no schedule gives it.
    """

    step: int
    update_factors: bool
    refresh_inverses: bool
    search_gamma: bool
    measure: bool
    lr: float | None = None
    damping: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """The periods, in steps, None where an adaptation is off, and the values that a step is given.

    `lr` and `damping` are None where there is none to give.
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
            lr=_given(step, self.lr),
            damping=_given(step, self.damping),
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


def _given(step: int, value: float | Schedule | None) -> float | None:
    return value.value(step) if isinstance(value, Schedule) else value
