"""What a step was decided to do, and the update that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a step does: `update = mu previous_update - alpha directions[candidate]`.

    `predicted_change` is M(delta) - M(0) on the batch, None if the Fisher products were not
    computed; `prediction_for_ratio` is the part of it that the reduction ratio compares with.
    If `applied` is False, a number was not finite, and nothing may be applied.
    """

    candidate: int
    gamma: float
    alpha: float
    mu: float
    update_norm: float
    predicted_change: float | None
    prediction_for_ratio: float | None
    applied: bool = True


def skipped_choice(gamma: float) -> Choice:
    """Return the choice to apply nothing."""
    return Choice(
        candidate=0,
        gamma=gamma,
        alpha=0.0,
        mu=0.0,
        update_norm=0.0,
        predicted_change=None,
        prediction_for_ratio=None,
        applied=False,
    )


def combine(
    direction: Tensor, previous_update: Tensor, alpha: float, mu: float, out: Tensor | None = None
) -> Tensor:
    """Return the new update [P], computed in the memory of the previous one, or in `out`.

    Every process that holds the parameters does this same arithmetic, so all stay equal bit by bit.
    """
    memory = previous_update if out is None else out
    return torch.mul(previous_update, mu, out=memory).add_(direction, alpha=-alpha)
