"""K-FAC in a training loop of your own: gradients are preconditioned in place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_dist.config import KFACSpec, kfac_settings
from kfac_dist.coordination.steps.plan import StepPlan, StepSchedule
from kfac_dist.coordination.steps.sampling import subset_positions
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.blocks.registration_report import ReportRow
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.inverse.curvature import Curvature
from kfac_dist.core.inverse.precondition import matrices_of, vector_of
from kfac_dist.core.passes.distributions import DistributionName, get_distribution
from kfac_dist.core.statistics.sums import BatchStatistics
from kfac_dist.core.step.step_rule import constrained_step
from kfac_dist.core.vector import is_finite, trainable_parameters, unflatten
from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim.model_calls import ModelCall, ModelCalls, RepeatedCalls
from kfac_dist.optim.observer import ForwardObserver, plain_module, process_group_of

# Options of `KFAC` about the step, which here is the user's own optimizer's.
_FOREIGN = (
    "step_rule",
    "gamma",
    "l2",
    "fisher_fraction",
    "averaging",
    "lr",
    "momentum",
    "precondition_dtype",
)


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

    Forward passes in training mode are observed. `step` computes statistics from their inputs in
    passes of its own, on the fraction `statistics_fraction` of the cases and in the precision of
    the parameters, whatever autocast does elsewhere. If gradients are accumulated over several
    backward passes, they belong to all the inputs seen since the last step.

    The direction is linear in the gradient, so a gradient scaled by a GradScaler gives an equally
    scaled direction. With `norm_constraint`, call `scaler.unscale_` before `step`.

    The loss of `distribution` is a sum over the positions of a case (a sequence of T tokens has
    T). If your loss is a mean over positions, multiply the damping and the learning rate by T.

    Args:
        model: called with tensors of inputs, the cases along their first axes; returns one tensor
            of outputs, which parametrise `distribution`. It may be wrapped in
            DistributedDataParallel, and compiled.
        distribution: predictive distribution of the outputs: `"bernoulli"`, `"categorical"` or
            `"gaussian"`, as for `KFAC`.
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
        step_count: number of steps so far.
        numeric_events: how often each rung of the ladder of numeric trouble was climbed
            (docs/operations.md explains the names).

    Raises:
        InvalidSpecError: an option is unknown, out of range, or belongs to your own loop.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        distribution: DistributionName,
        damping: float = 1e-2,
        norm_constraint: float | None = None,
        lr: float | Callable[[], float] | None = None,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        calls: ModelCalls | None = None,
        **options: Any,
    ) -> None:
        self.settings = _settings(damping, options)
        if (norm_constraint is None) != (lr is None):
            raise InvalidSpecError("norm_constraint and lr belong together: give both or neither")
        self.damping = damping
        self.norm_constraint = norm_constraint
        self.step_count = 0
        self.numeric_events: Counter[str] = Counter()
        self._lr = lr
        self._group = process_group or process_group_of(model)
        plain = plain_module(model)
        self._registration = register(plain, self.settings)
        self._repeated = RepeatedCalls(plain)
        self._computer = BatchComputer(
            self._repeated,
            distribution=get_distribution(distribution),
            seed=seed,
            registration=self._registration,
            fisher_type=self.settings.fisher_type,
        )
        _check_dtypes(plain)
        self._curvature = Curvature(self.settings, self._registration, self.numeric_events)
        self._schedule = StepSchedule(
            factor_update_period=self.settings.factor_update_period,
            inverse_update_period=self.settings.inverse_update_period,
            gamma_adapt_period=None,
            damping_adapt_period=None,
        )
        self._observer = ForwardObserver(
            model,
            wants=lambda: self._schedule.plan(self.step_count + 1).update_factors,
            calls=calls or ModelCalls(),
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
            InvalidSpecError: the model made no forward pass in training mode since the last step.
        """
        plan = self._schedule.plan(self.step_count + 1)
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            self._update_factors(plan)
            self.step_count = plan.step  # a refused step raises before this line and does not count
            self._invert(plan)
            self._precondition()

    @property
    def _device(self) -> torch.device:
        return self._computer.parameters[0].device

    def _update_factors(self, plan: StepPlan) -> None:
        if not plan.update_factors:
            return
        inputs = self._observer.pop_inputs()
        if not inputs:
            raise InvalidSpecError(
                f"KFACPreconditioner.step: step {plan.step} needs statistics, and the model made "
                "no forward pass in training mode since the last step. If the model was compiled "
                "and called before KFACPreconditioner was made, pass it the compiled model"
            )
        statistics, num_cases = self._statistics(plan.step, inputs)
        self._curvature.update(plan.step, statistics, num_cases)

    def _statistics(self, step: int, inputs: list[ModelCall]) -> tuple[BatchStatistics, int]:
        """Return the sums over all micro-batches and processes, and their number of cases."""
        with self._observer.paused():
            statistics, num_cases = self._own_statistics(step, inputs)
        return statistics, self._reduce(statistics, num_cases)

    def _own_statistics(self, step: int, inputs: list[ModelCall]) -> tuple[BatchStatistics, int]:
        """Return the sums over the micro-batches of this process, and their number of cases."""
        rank, num_processes = self._place()
        links, bases = self._curvature.structure.links, self._curvature.shelf.bases()
        first_row, num_cases, parts = 0, 0, []
        for call in inputs:
            rows = subset_positions(call.num_cases, self.settings.statistics_fraction)
            row = first_row + rank * len(rows)
            for part in self._repeated.parts(call, rows):
                with self._repeated.repeating(part) as cases:
                    parts.append(
                        self._computer.statistics(
                            cases, None, step=step, first_row=row, links=links, bases=bases
                        )
                    )
                row += part.num_cases
            first_row += num_processes * len(rows)
            num_cases += len(rows)
        total = parts[0]
        for other in parts[1:]:
            total.add_(other)
        return total, num_cases

    def _place(self) -> tuple[int, int]:
        if self._group is None:
            return 0, 1
        return dist.get_rank(self._group), dist.get_world_size(self._group)

    def _reduce(self, statistics: BatchStatistics, num_cases: int) -> int:
        """Sum over the processes, in place; return the number of cases of all processes."""
        if self._group is None:
            return num_cases
        tensors = list(statistics.tensors())
        count = tensors[0].new_tensor([num_cases])
        flat = torch.cat([tensor.reshape(-1) for tensor in (*tensors, count)])
        dist.all_reduce(flat, group=self._group)
        for tensor, piece in zip(tensors, unflatten(flat[:-1], tensors), strict=True):
            tensor.copy_(piece)
        return int(flat[-1])

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

    def _scale(self, gradient: Tensor, direction: Tensor) -> float:
        if self.norm_constraint is None or self._lr is None:
            return 1.0
        lr = self._lr() if callable(self._lr) else self._lr
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
        self.step_count = state_dict["step_count"]
        self.damping = state_dict["damping"]
        self._curvature.load_state_dict(state_dict)


def _settings(damping: float, options: dict[str, Any]) -> KFACSpec:
    foreign = [name for name in options if name in _FOREIGN]
    if foreign:
        raise InvalidSpecError(
            f"KFACPreconditioner has no option {', '.join(foreign)}: it computes directions, and "
            "your own optimizer takes the step"
        )
    settings = kfac_settings({"damping": damping, **options})
    if settings.fisher_type == "empirical":
        raise InvalidSpecError(
            'KFACPreconditioner: fisher_type "empirical" needs the targets, which it does not '
            'see; use "mc" or "exact"'
        )
    return settings


def _dense(gradient: Tensor) -> Tensor:
    if gradient.layout != torch.strided:
        raise InvalidSpecError(
            f"KFACPreconditioner: a gradient has layout {gradient.layout}; make the gradients of "
            "embeddings dense (sparse=False)"
        )
    return gradient


def _check_dtypes(model: nn.Module) -> None:
    for name, parameter in trainable_parameters(model).items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise InvalidSpecError(
                f"KFACPreconditioner: {name} is {parameter.dtype}; parameters must be float32 or "
                "float64. Use autocast for the passes in half precision"
            )
