"""What a step does with its directions, and the one arithmetic that everybody does it with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a step does: `update = mu previous_update - alpha directions[candidate]`.

    `predicted_change` is M(delta) - M(0) on the batch, None when the Fisher products were not
    computed; `prediction_for_ratio` is the part of it that the reduction ratio compares with.
    `applied` is False when a number was not finite: nothing may be applied.
    """

    candidate: int
    gamma: float
    alpha: float
    mu: float
    update_norm: float
    predicted_change: float | None
    prediction_for_ratio: float | None
    applied: bool = True


def combine(direction: Tensor, previous_update: Tensor, alpha: float, mu: float) -> Tensor:
    """Turn the previous update [P] into the new one, in place, and return it.

    Every holder of the parameters does this same arithmetic.
    """
    return previous_update.mul_(mu).add_(direction, alpha=-alpha)
