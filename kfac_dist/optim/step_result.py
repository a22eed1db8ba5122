"""What a step of the serial optimizer tells."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did.

    `loss` is the mean of -log r(y|z) over the batch before the update, in nats a case, `objective`
    adds the l2 term. `predicted_change` is M(delta) - M(0); `reduction_ratio` (rho) is there every
    `damping.adapt_period` steps. `damping` and `gamma` are the values after the step, `lr` that of
    the step, None where alpha needs none. `applied` is False when a number was not finite and the
    parameters were left alone.
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
