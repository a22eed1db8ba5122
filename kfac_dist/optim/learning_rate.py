"""The learning rate of `KFAC` in its parameter group, where torch's schedulers read and set it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kfac_dist.coordination.steps.plan import StepPlan, StepSchedule
from kfac_dist.coordination.steps.schedule import Schedule
from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim.option_checks import check_number

_NO_LR = (
    "KFAC has no lr under step_rule: adaptive, which chooses the step size itself in each step. "
    "For a learning rate and its schedulers use step_rule: norm_constraint"
)


class GroupWithoutRate(dict[str, Any]):
    """A parameter group of a step rule that takes no learning rate: asking for one is refused."""

    def __missing__(self, key: str) -> Any:
        """Say why there is no lr; other keys are missing as in any group."""
        if key == "lr":
            raise InvalidSpecError(_NO_LR)
        raise KeyError(key)


class LearningRate:
    """The learning rate of each step: that of the parameter group, or of the option's schedule.

    With a number as the option `lr`, the rate is `param_groups[0]["lr"]`, which may be set. With a
    schedule, the rate is the schedule's and is written to the group for others to read.
    """

    def __init__(self, schedule: StepSchedule) -> None:
        lr = schedule.lr
        self._is_scheduled = isinstance(lr, Schedule)
        self._written = schedule.plan(1).lr
        self.defaults: dict[str, Any] = {} if self._written is None else {"lr": self._written}

    def group(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Return the parameter group, which has the first rate if the step rule takes one."""
        group = GroupWithoutRate() if self._written is None else {}
        group.update(params=list(parameters), **self.defaults)
        return group

    def planned(self, plan: StepPlan, group: dict[str, Any]) -> StepPlan:
        """Return the plan of a step with the rate that the step uses.

        Raises:
            InvalidSpecError: the group has an lr that is not a finite number, 0 or above, that
                contradicts the schedule, or that the step rule does not take.
        """
        if self._written is None:
            if "lr" in group:
                raise InvalidSpecError(_NO_LR)
            return plan
        lr = check_number("KFAC", 'param_groups[0]["lr"]', group["lr"], zero=True)
        if not self._is_scheduled:
            return replace(plan, lr=lr)
        if lr != self._written:
            raise InvalidSpecError(
                f'KFAC: param_groups[0]["lr"] was set to {lr:g}, but the option lr has a schedule, '
                f"which set it to {self._written:g}. Give lr as a number to set it yourself or to "
                "use a scheduler of torch"
            )
        self._written = group["lr"] = plan.lr
        return plan

    def state(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the group has beside its parameters: the lr, and what schedulers add."""
        return {key: value for key, value in group.items() if key != "params"}

    def restore(self, group: dict[str, Any], state: Mapping[str, Any]) -> None:
        """Set the group to a saved state."""
        for key in [key for key in group if key != "params" and key not in state]:
            del group[key]
        group.update(state)
        if self._is_scheduled:
            self._written = group["lr"]
