"""The step rules (the option `step_rule`): how far a step goes along its direction.

A new rule is a subclass of `StepRule` and a row in `step_rule_for`; its name is also a value of
`KFACSpec.step_rule`, and settings of its own are fields there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from kfac_dist.config import KFACSpec
from kfac_dist.core.step.plane_model import PlaneModel


class StepRule(ABC):
    """How a step size and a momentum are chosen; a rule has settings and no state.

    `needs_fisher`: every step needs exact Fisher products along its directions; under a rule
    without them, only the steps that measure the reduction ratio compute them.
    `takes_lr`: each step is given the value of the option `lr` or of its schedule.
    """

    needs_fisher = False
    takes_lr = False

    def __init__(self, settings: KFACSpec) -> None:
        self._settings = settings

    @property
    def gamma_search_period(self) -> int | None:
        """Steps from one search for gamma to the next, None if gamma follows the damping.

        A search compares its candidates by the quadratic model, which takes Fisher products.
        """
        return self._settings.gamma.adapt_period if self.needs_fisher else None

    @abstractmethod
    def coefficients(
        self, model: PlaneModel, *, ridge: float, lr: float | None
    ) -> tuple[float, float]:
        """Return (alpha, mu) of the update `alpha Delta + mu delta_0`.

        Args:
            model: the quadratic model on the plane of Delta and delta_0; its Fisher products are 0
                if they were not computed.
            ridge: damping + l2, the multiple of the identity in the model.
            lr: the learning rate of the step, None under a rule that does not take one.
        """


class AdaptiveRule(StepRule):
    """The minimum of the quadratic model (docs/algorithm.md#step-size-and-momentum)."""

    needs_fisher = True

    def coefficients(
        self, model: PlaneModel, *, ridge: float, lr: float | None
    ) -> tuple[float, float]:
        """Return (alpha, mu) at the minimum."""
        return model.minimum(ridge)


class NormConstraintRule(StepRule):
    """The learning rate, bounded, and a fixed momentum (docs/algorithm.md#norm-constraint)."""

    takes_lr = True

    def coefficients(
        self, model: PlaneModel, *, ridge: float, lr: float | None
    ) -> tuple[float, float]:
        """Return the bounded learning rate and `momentum`."""
        assert lr is not None, "the norm constraint needs an lr"
        alpha = constrained_step(lr, self._settings.norm_constraint, -model.slopes[0])
        return alpha, self._settings.momentum


def constrained_step(lr: float, constraint: float, slope: float) -> float:
    """Return `min(lr, sqrt(constraint / (direction . grad)))` (Ba et al., 2017).

    `slope` is the product of direction and gradient. The step keeps the squared norm of the
    update, in the metric of the approximate Fisher, below `constraint`.
    """
    return lr if slope <= 0 else min(lr, math.sqrt(constraint / slope))


def step_rule_for(settings: KFACSpec) -> StepRule:
    """Return the rule that `settings.step_rule` names."""
    rules: dict[str, type[StepRule]] = {
        "adaptive": AdaptiveRule,
        "norm_constraint": NormConstraintRule,
    }
    return rules[settings.step_rule](settings)
