"""From the settings of an optimizer to the rules of what is due, and with which values."""

from __future__ import annotations

from kfac_dist.config import KFACSpec, LearningRateSchedule, ValueSchedule
from kfac_dist.coordination.steps.plan import StepSchedule
from kfac_dist.coordination.steps.schedule import Schedule
from kfac_dist.core.step.update import searches_gamma


def kfac_schedule(settings: KFACSpec) -> StepSchedule:
    """Return the periods and given values of `settings`.

    gamma has no period where it follows the damping, and lr no value where alpha is computed.
    """
    damping = settings.damping.initial
    return StepSchedule(
        factor_update_period=settings.factor_update_period,
        inverse_update_period=settings.inverse_update_period,
        gamma_adapt_period=settings.gamma.adapt_period if searches_gamma(settings) else None,
        damping_adapt_period=settings.damping.adapt_period,
        lr=schedule_of(settings.lr) if settings.step_rule == "norm_constraint" else None,
        damping=schedule_of(damping) if isinstance(damping, ValueSchedule) else None,
    )


def schedule_of(section: float | ValueSchedule) -> float | Schedule:
    """Return a number or a schedule of the specification as the rules know it."""
    if not isinstance(section, ValueSchedule):
        return section
    return Schedule(
        kind=section.schedule,
        initial=section.initial,
        final=section.initial if section.final is None else section.final,
        steps=section.steps or 1,
        warmup_steps=section.warmup_steps if isinstance(section, LearningRateSchedule) else 0,
    )
