"""K-FAC in a training loop of your own: gradients are preconditioned in place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_dist.coordination.steps.plan import StepPlan, StepSchedule
from kfac_dist.coordination.steps.sampling import SubsetRule
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.blocks.registration_report import ReportRow
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.inverse.curvature import Curvature
from kfac_dist.core.inverse.precondition import matrices_of, vector_of
from kfac_dist.core.passes.distributions import DistributionName, get_distribution
from kfac_dist.core.step.step_rule import constrained_step
from kfac_dist.core.vector import is_finite, unflatten
from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim.arithmetic import full_precision
from kfac_dist.optim.axes import checked_case_axis
from kfac_dist.optim.call_statistics import (
    RepeatedCalls,
    place_in,
    reduce_statistics,
    statistics_of_calls,
)
from kfac_dist.optim.factor_memory import check_factor_memory
from kfac_dist.optim.model_calls import ModelCalls
from kfac_dist.optim.model_guard import ModelGuard, check_model
from kfac_dist.optim.observer import (
    ForwardObserver,
    plain_module,
    process_group_of,
    statistics_part,
    unobserved,
    unseen_message,
)
from kfac_dist.optim.option_checks import (
    check_count,
    check_fused,
    check_number,
    preconditioner_settings,
)

_OWNER = "KFACPreconditioner"
# Set on a gradient that is a direction: its version, which the next backward pass changes.
_MARK = "_kfac_direction_version"

# Cases that statistics have by default, if a batch has them. On one or two cases G is a matter of
# luck: where it is small, an inverse that stays in use for many steps makes their updates too long.
_LEAST_STATISTICS = 32


class KFACPreconditioner:
    """Replaces the gradients of a model by their directions; your own optimizer takes the step.

    Call `step` between `backward` and the step of any torch optimizer:

        preconditioner = KFACPreconditioner(model, distribution="categorical", damping=1e-2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss_function(model(inputs), targets).backward()
            preconditioner.step()
            optimizer.step()

    Forward passes in training mode are observed. `step` computes statistics in passes of its own,
    on the fraction `statistics_fraction` of the cases and in the precision of the parameters,
    whatever autocast does elsewhere. Unless you give the fraction, they are on at least 32 cases of
    each batch, or on all. The cases are those of the passes whose gradients are in `.grad`: a
    backward pass has reached them since the last step, and since the gradients were last cleared.
    They are copied when the model is called, so a loop may reuse its tensors.

    The hooks on the model end with this object, with `remove`, or with a `with` block:

        with KFACPreconditioner(model, distribution="categorical") as preconditioner:
            ...

    A copied, pickled or saved model is not observed.

    The direction is linear in the gradient, so a gradient scaled by a GradScaler gives an equally
    scaled direction. With `norm_constraint`, call `scaler.unscale_` before `step`.

    The loss of `distribution` is a sum over the positions of a case (a sequence of T tokens has
    T). If your loss is a mean over positions, multiply the damping and the learning rate by T.

    Args:
        model: called with tensors of inputs; returns one tensor of outputs, which parametrise
            `distribution`. It may be wrapped in DistributedDataParallel, and compiled.
        distribution: predictive distribution of the outputs: `"bernoulli"`, `"categorical"` or
            `"gaussian"`, as for `KFAC`.
        case_axis: the axis of the inputs along which the cases lie, as for `KFAC`.
        class_axis: the axis of the outputs with the classes, as for `KFAC`. Targets are not seen
            here, so outputs with more than two dimensions need it.
        damping: lambda. The strength of the factored damping, gamma, is its square root.
        norm_constraint: bound c on what a step may change. Directions are scaled by
            `min(1, sqrt(c / (direction . gradient)) / lr)`.
        lr: learning rate of the optimizer, or a function that returns it. Give it if and only if
            `norm_constraint` is given.
        process_group: statistics are summed over its processes, so that all of them make the same
            directions. By default it is the group of DistributedDataParallel, or else the default
            group of torch.distributed if that is initialised.
        seed: seed of the targets that are sampled for the factors.
        calls: how to read calls of the model and what it returns, if that is not one tensor.
        options: further options of `KFAC`: `inverse`, `fisher_type` (`"mc"` or `"exact"`),
            `factor_decay`, `factor_update_period`, `inverse_update_period`,
            `statistics_fraction`, `pi_norm`, and those that choose the layers' blocks.

    Attributes:
        settings: all options, with their defaults.
        damping: lambda; you may change it between steps.
        norm_constraint: c; you may change it between steps.
        step_count: number of steps so far.
        numeric_events: how often each rung of the ladder of numeric trouble was climbed
            (docs/operations.md explains the names).

    Raises:
        InvalidSpecError: an option is unknown, out of range, or belongs to your own loop, or the
            layers of the model cannot be observed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        distribution: DistributionName,
        case_axis: int = 0,
        class_axis: int | None = None,
        damping: float = 1e-2,
        norm_constraint: float | None = None,
        lr: float | Callable[[], float] | None = None,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        calls: ModelCalls | None = None,
        **options: Any,
    ) -> None:
        self.settings = preconditioner_settings(damping, options)
        if (norm_constraint is None) != (lr is None):
            raise InvalidSpecError(
                f"{_OWNER}: norm_constraint and lr belong together: give both or neither"
            )
        if norm_constraint is not None:
            check_number(_OWNER, "norm_constraint", norm_constraint)
        if lr is not None and not callable(lr):
            check_number(_OWNER, "lr", lr, zero=True)
        self.damping = damping
        self.norm_constraint = norm_constraint
        self.step_count = 0
        self.numeric_events: Counter[str] = Counter()
        self._lr = lr
        self._is_removed = False
        plain = plain_module(model)
        check_model(plain, _OWNER)
        self._group = process_group or process_group_of(model)
        self._registration = register(plain, self.settings)
        check_fused(_OWNER, self.settings, self._registration.sites)
        self._computer = BatchComputer(
            RepeatedCalls(plain),
            distribution=get_distribution(distribution, class_axis),
            seed=check_count(_OWNER, "seed", seed),
            registration=self._registration,
            fisher_type=self.settings.fisher_type,
        )
        check_factor_memory(self._registration, self._computer.parameters[0])
        self._guard = ModelGuard(plain, _OWNER)
        self._curvature = Curvature(self.settings, self._registration, self.numeric_events)
        self._schedule = StepSchedule(
            factor_update_period=self.settings.factor_update_period,
            inverse_update_period=self.settings.inverse_update_period,
            gamma_adapt_period=None,
            damping_adapt_period=None,
        )
        # Who sets the fraction gets it; by default a small batch is used as a whole.
        num_processes = place_in(self._group)[1]
        least = 1 if "statistics_fraction" in options else -(-_LEAST_STATISTICS // num_processes)
        calls = calls or ModelCalls()
        # `keep` must not refer to this object, or nothing would end the hooks with it.
        self._observer = ForwardObserver(
            model,
            self._computer.parameters,
            keep=partial(
                statistics_part,
                calls=calls,
                subset=SubsetRule(least_cases=max(self._registration.least_cases, least)),
                fraction=self.settings.statistics_fraction,
                dtype=self._computer.parameters[0].dtype,
                case_axis=checked_case_axis(case_axis),
            ),
            outputs=calls.outputs_of,
        )

    def remove(self) -> None:
        """Take the hooks off the model; no step is possible afterwards."""
        self._observer.remove()
        self._is_removed = True

    def __enter__(self) -> Self:
        """Return the preconditioner, for a `with` block that removes it at its end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the hooks off the model."""
        self.remove()

    def __reduce__(self) -> str:
        """Refuse copies and pickles: they would observe no model."""
        raise InvalidSpecError(
            f"a {_OWNER} cannot be copied or pickled, because it observes its model. Make a new "
            "one for the copied model, and give it the state with load_state_dict(state_dict())"
        )

    @property
    def gamma(self) -> float:
        """Strength of the factored damping: the square root of `damping`."""
        return math.sqrt(self.damping)

    def step(self) -> None:
        """Replace `.grad` of every parameter by its direction, in place.

        A parameter without a gradient is treated as having a zero gradient, and stays without.
        If a gradient is not finite, all are left as they are, and the event is counted.

        Raises:
            InvalidSpecError: no backward pass has reached a forward pass in training mode since
                the last step, no parameter has a gradient, the model has changed, or `damping` or
                the learning rate is out of range.
        """
        self._check_state()
        plan = self._schedule.plan(self.step_count + 1)
        with torch.no_grad(), full_precision(self._device), unobserved():
            self._update_factors(plan)
            self._check_gradients(plan)
            self._count(plan.step)  # a refused step raises before this line and does not count
            self._invert(plan)
            self._precondition()

    @property
    def _device(self) -> torch.device:
        return self._computer.parameters[0].device

    def _count(self, step: int) -> None:
        self.step_count = step
        self._observer.wanted = self._schedule.plan(step + 1).update_factors

    def _check_state(self) -> None:
        if self._is_removed:
            raise InvalidSpecError(
                f"{_OWNER}.step: its hooks were removed from the model; make a new {_OWNER}, and "
                "give it the state with load_state_dict(state_dict())"
            )
        self._guard.check()
        check_number(_OWNER, "damping", self.damping)
        if self.norm_constraint is not None:
            check_number(_OWNER, "norm_constraint", self.norm_constraint)
            self._current_lr()

    def _current_lr(self) -> float:
        lr = self._lr() if callable(self._lr) else self._lr
        return check_number(_OWNER, "lr", lr, zero=True)

    def _check_gradients(self, plan: StepPlan) -> None:
        gradients = [p.grad for p in self._computer.parameters if p.grad is not None]
        if not gradients:
            raise InvalidSpecError(
                f"{_OWNER}.step: no parameter has a gradient in step {plan.step}. Call backward "
                "before step, and zero_grad before backward or after step"
            )
        if all(getattr(gradient, _MARK, None) == gradient._version for gradient in gradients):
            raise InvalidSpecError(
                f"{_OWNER}.step: the gradients are directions already, which a step wrote to "
                f"them, and no backward pass came after it. Call backward before step {plan.step}"
            )

    def _update_factors(self, plan: StepPlan) -> None:
        if not plan.update_factors:
            return
        num_forward = self._observer.num_forward
        inputs = self._observer.pop_inputs()
        place = place_in(self._group)
        if not inputs and place[1] == 1:
            raise InvalidSpecError(unseen_message(plan.step, num_forward))
        statistics, num_cases = statistics_of_calls(
            self._computer, self._curvature, inputs, step=plan.step, place=place
        )
        num_cases = reduce_statistics(statistics, num_cases, self._group)
        if num_cases == 0:
            if not inputs:
                raise InvalidSpecError(unseen_message(plan.step, num_forward))
            raise InvalidSpecError(
                f"{_OWNER}.step: the batches since the last step have no cases; step {plan.step} "
                "needs at least one"
            )
        self._curvature.update(plan.step, statistics, num_cases)

    def _invert(self, plan: StepPlan) -> None:
        if plan.refresh_inverses:
            self._curvature.invert((self.gamma,))
            shelf = self._curvature.shelf
            shelf.use(shelf.install(shelf.admit()), self.gamma, search_open=False)

    def _precondition(self) -> None:
        parameters = self._computer.parameters
        gradients = [p.new_zeros(p.shape) if p.grad is None else _dense(p.grad) for p in parameters]
        vector = torch.cat([gradient.reshape(-1) for gradient in gradients])
        if not is_finite(vector):
            self.numeric_events["bad_step"] += 1
            return
        blocks = self._registration.blocks
        solved = self._curvature.precondition(matrices_of(vector, blocks), self.gamma)
        direction = vector_of(solved, blocks, vector)
        direction.mul_(self._scale(vector, direction))
        for parameter, piece in zip(parameters, unflatten(direction, parameters), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(piece)
                setattr(parameter.grad, _MARK, parameter.grad._version)

    def _scale(self, gradient: Tensor, direction: Tensor) -> float:
        if self.norm_constraint is None:
            return 1.0
        lr = self._current_lr()
        slope = float(torch.dot(gradient, direction))
        return constrained_step(lr, self.norm_constraint, slope) / lr if lr > 0 else 1.0

    def registration_report(self) -> tuple[ReportRow, ...]:
        """Return one row for each parameter: its block, factor sizes and cost."""
        return self._registration.report

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on, except for the model and the options."""
        return {
            "step_count": self.step_count,
            "damping": self.damping,
            **self._curvature.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a copy of a state that was saved with the same model and options.

        Raises:
            InvalidSpecError: the state belongs to a model with other layers, or to another
                structure of the inverse.
        """
        self._curvature.check_state(state_dict)
        if "damping" not in state_dict:
            raise InvalidSpecError(f"this is a state of KFAC, not of {_OWNER}: it has no damping")
        self._count(state_dict["step_count"])
        self.damping = state_dict["damping"]
        self._curvature.load_state_dict(state_dict, self._computer.parameters[0])


def _dense(gradient: Tensor) -> Tensor:
    if gradient.layout != torch.strided:
        raise InvalidSpecError(
            f"{_OWNER}: a gradient has layout {gradient.layout}; make the gradients of "
            "embeddings dense (sparse=False)"
        )
    return gradient
