"""From the settings of an optimizer to its `StepSchedule`: what is due when, and which values."""

from __future__ import annotations

from kfac_dist.config import KFACSpec, LearningRateSchedule, ValueSchedule
from kfac_dist.coordination.steps.plan import StepSchedule
from kfac_dist.coordination.steps.schedule import Schedule
from kfac_dist.core.step.step_rule import step_rule_for


def kfac_schedule(settings: KFACSpec) -> StepSchedule:
    """Return the periods and the scheduled values of `settings`.

    The step rule decides whether there is a period for the search for gamma, and an lr.
    """
    rule = step_rule_for(settings)
    damping = settings.damping.initial
    return StepSchedule(
        factor_update_period=settings.factor_update_period,
        inverse_update_period=settings.inverse_update_period,
        gamma_adapt_period=rule.gamma_search_period,
        damping_adapt_period=settings.damping.adapt_period,
        lr=schedule_of(settings.lr) if rule.takes_lr else None,
        damping=schedule_of(damping) if isinstance(damping, ValueSchedule) else None,
    )


def schedule_of(section: float | ValueSchedule) -> float | Schedule:
    """Return a number as it is, and a schedule of the specification as the rules read it."""
    if not isinstance(section, ValueSchedule):
        return section
    return Schedule(
        kind=section.schedule,
        initial=section.initial,
        final=section.initial if section.final is None else section.final,
        steps=section.steps or 1,
        warmup_steps=section.warmup_steps if isinstance(section, LearningRateSchedule) else 0,
    )
