"""What a step of the serial optimizer returns."""

from __future__ import annotations

from dataclasses import dataclass

from kfac_dist.coordination.steps.plan import StepPlan
from kfac_dist.core.step.choice import Choice
from kfac_dist.core.step.update import KFACUpdate


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did.

    Attributes:
        step: number of the step, from 1.
        loss: mean of -log r(y|z) over the batch before the update, in nats a case.
        objective: the loss plus the l2 term.
        alpha: step size along the direction.
        mu: momentum, the weight of the previous update.
        damping: lambda after the step.
        gamma: strength of the factored damping after the step.
        update_norm: Euclidean norm of the update.
        predicted_change: M(delta) - M(0), None if the step computed no Fisher products.
        reduction_ratio: rho, every `damping.adapt_period` steps; otherwise None.
        lr: learning rate of the step, None under a step rule that does not take one.
        applied: False if a number was not finite, so that the parameters were left alone.
    """

    step: int
    loss: float
    objective: float
    alpha: float
    mu: float
    damping: float
    gamma: float
    update_norm: float
    predicted_change: float | None
    reduction_ratio: float | None
    lr: float | None
    applied: bool


def step_result(
    plan: StepPlan,
    update: KFACUpdate,
    losses: tuple[float, float],
    choice: Choice | None,
    ratio: float | None,
) -> StepResult:
    """Return the result of a step with these `losses`: loss and objective.

    `choice` is None if no update was applied.
    """
    return StepResult(
        step=plan.step,
        loss=losses[0],
        objective=losses[1],
        alpha=choice.alpha if choice else 0.0,
        mu=choice.mu if choice else 0.0,
        damping=update.damping,
        gamma=update.gamma,
        update_norm=choice.update_norm if choice else 0.0,
        predicted_change=choice.predicted_change if choice else None,
        reduction_ratio=ratio,
        lr=plan.lr,
        applied=choice is not None,
    )
