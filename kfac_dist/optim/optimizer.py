"""The serial K-FAC optimizer: a guide to the algorithm, and the oracle of the distributed run.

`KFAC.step` reads like the paper. The distributed run does the same work with the same functions:
`BatchComputer` in the gradient workers, `FactorAverages` and a `Structure` in the inverse workers,
`DirectionComputer` and `KFACUpdate` in the
parameter server.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.config import KFACSpec, kfac_settings
from kfac_dist.coordination.steps.plan import StepPlan
from kfac_dist.coordination.steps.sampling import SubsetRule
from kfac_dist.coordination.steps.staleness import StalenessBound
from kfac_dist.core.blocks.layout import BlockLayout
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.blocks.registration_report import ReportRow
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.factors import LayerFactors
from kfac_dist.core.inverse.curvature import Curvature
from kfac_dist.core.inverse.directions import DirectionComputer
from kfac_dist.core.inverse.shelf import (
    InverseVersion,
    all_inverted_for,
    layer_inverses,
    nearest_inverses,
)
from kfac_dist.core.passes.chain import Trace
from kfac_dist.core.passes.distributions import DistributionName, get_distribution
from kfac_dist.core.passes.fisher import FisherMeans
from kfac_dist.core.step.averaging import ParameterAverage
from kfac_dist.core.step.block_numbers import (
    DirectionNumbers,
    direction_numbers,
)
from kfac_dist.core.step.choice import Choice, combine
from kfac_dist.core.step.flat_parameters import FlatParameters
from kfac_dist.core.step.update import KFACUpdate
from kfac_dist.core.vector import add_to_parameters, is_finite, rows_at
from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim.arithmetic import full_precision
from kfac_dist.optim.axes import cases_of, checked_case_axis
from kfac_dist.optim.factor_memory import check_factor_memory
from kfac_dist.optim.learning_rate import LearningRate
from kfac_dist.optim.model_guard import ModelGuard, check_model
from kfac_dist.optim.observer import (
    in_place_message,
    in_type_of_parameters,
    unobserved,
    version_of,
)
from kfac_dist.optim.option_checks import check_count, check_delays, check_fused
from kfac_dist.optim.precision import choose_precondition_dtype
from kfac_dist.optim.schedules import kfac_schedule
from kfac_dist.optim.step_result import StepResult, step_result

_LOG = logging.getLogger(__name__)


class KFAC(torch.optim.Optimizer):
    """Trains a model by K-FAC in one process: each call of `step` does the whole algorithm.

    `step` computes the loss, the gradient and the curvature of a batch and updates the parameters.
    It needs no `backward` and no `zero_grad`. To precondition the gradients of your own training
    loop instead, use `KFACPreconditioner`; to train in several processes, submit a job.

        optimizer = KFAC(model, distribution="categorical", damping=1.0)
        for inputs, targets in loader:
            result = optimizer.step(inputs, targets)
            print(result.step, result.loss)

    Args:
        model: called with one tensor of inputs; returns one tensor of outputs, which parametrise
            `distribution`.
        distribution: predictive distribution of the outputs, which also defines the loss:
            `"bernoulli"` (outputs are logits), `"categorical"` (logits of the classes along
            `class_axis`; a label of -100 leaves its position out) or `"gaussian"` (means; the
            variance is 1).
        case_axis: the axis of the inputs along which the cases lie: 1 for a sequence-first model.
            Where they lie inside the model and in its outputs is found out at the first step.
        class_axis: the axis of the outputs with the classes: -1 is the last, 1 that of torch's
            `cross_entropy`. Without it the last one is taken, and shapes that leave a choice are
            refused.
        seed: seed of the targets that are sampled for the factors.
        delay_steps: simulates an asynchronous run. Maps patterns of layer names to the number of
            steps by which a refresh of the inverses is used late; the last pattern that matches
            counts. A job with the same `staleness.delay_steps` takes the same steps.
        warmup_steps: number of first steps without delays, as `staleness.warmup_steps` in a job.
        options: the fields of the job specification's `optimizer` section, with the same names and
            defaults. `damping` and `gamma` may be numbers, their initial values. If `lr` is a
            number, `param_groups[0]["lr"]` is the learning rate, which schedulers of torch set.

    Attributes:
        settings: all options, with their defaults; `precondition_dtype: auto` is replaced by the
            type that was chosen.
        step_count: number of steps so far, skipped ones included.
        numeric_events: how often each rung of the ladder of numeric trouble was climbed
            (docs/operations.md explains the names).

    Raises:
        InvalidSpecError: an option is unknown, out of range, not possible for the type of the
            parameters, or does not fit the model, or the model is wrapped for several processes
            or has layers that cannot be observed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        distribution: DistributionName,
        case_axis: int = 0,
        class_axis: int | None = None,
        seed: int = 0,
        delay_steps: Mapping[str, int] | None = None,
        warmup_steps: int = 0,
        **options: Any,
    ) -> None:
        self.settings: KFACSpec = kfac_settings(options)
        check_model(model, "KFAC")
        self._registration = register(model, self.settings)
        check_fused("KFAC", self.settings, self._registration.sites)
        self._subset = SubsetRule(least_cases=self._registration.least_cases)
        self._computer = BatchComputer(
            model,
            distribution=get_distribution(distribution, class_axis),
            seed=check_count("KFAC", "seed", seed),
            registration=self._registration,
            fisher_type=self.settings.fisher_type,
            case_axis=checked_case_axis(case_axis),
        )
        self._case_axis = case_axis
        self._parameters = self._computer.parameters
        check_factor_memory(self._registration, self._parameters[0])
        self._guard = ModelGuard(model, "KFAC")
        precondition_dtype = choose_precondition_dtype(
            self.settings, self._registration.blocks, self._parameters[0]
        )
        self.settings = precondition_dtype.resolve(self.settings)
        _LOG.info("%s", precondition_dtype)
        self._schedule = kfac_schedule(self.settings)
        self._bound = StalenessBound(
            max_steps=0,
            warmup_steps=check_count("KFAC", "warmup_steps", warmup_steps),
            schedule=self._schedule,
            delay_steps=check_delays("KFAC", delay_steps or {}, self._registration.names),
        )
        self.numeric_events: Counter[str] = Counter()
        self._curvature = Curvature(self.settings, self._registration, self.numeric_events)
        self._layout = BlockLayout(self._registration.blocks)
        self._flat = FlatParameters(self._parameters, self._layout, self.settings.l2)
        self._theta = self._flat.read()
        self._gradient = torch.empty_like(self._theta)
        self._previous_update = torch.zeros_like(self._theta)
        self._update = KFACUpdate(self.settings)
        self._directions = DirectionComputer(self.settings, self._curvature.structure)
        averaging = self.settings.averaging
        self._average = ParameterAverage(averaging.decay, averaging.start) if averaging else None
        self.step_count = 0
        self._lr = LearningRate(self._schedule)
        super().__init__([self._lr.group(self._parameters)], self._lr.defaults)

    # torch's own optimizers are given a closure, not a batch.
    def step(self, inputs: Tensor, targets: Tensor) -> StepResult:  # type: ignore[override]
        """Do one step of K-FAC on a batch and return what it did.

        If the loss, the gradient, or every candidate for the update is not finite, the parameters
        are left as they are, and the result has `applied=False`.

        Args:
            inputs: [N, ...], the cases along the first axis, or along `case_axis`.
            targets: what the loss of `distribution` takes; their cases lie as those of the outputs.

        Raises:
            InvalidSpecError: the batch is empty or is not a pair of tensors; its targets do not
                fit the outputs or are not possible; nothing shows where the model has the cases;
                the model has changed since the start, changes its input in place or does not
                return one tensor; or the learning rate is out of range.
        """
        inputs = cases_of(inputs, self._case_axis, "KFAC.step")
        if len(inputs) == 0:
            raise InvalidSpecError("KFAC.step: the batch has no cases, at least one is needed")
        if not isinstance(targets, Tensor):
            raise InvalidSpecError(
                f"KFAC.step: the targets are {type(targets).__name__}, not one tensor"
            )
        self._guard.check()
        plan = self._lr.planned(self._schedule.plan(self.step_count + 1), self.param_groups[0])
        with full_precision(self._theta.device), unobserved():
            return self._step(plan, inputs, targets)

    def _step(self, plan: StepPlan, inputs: Tensor, targets: Tensor) -> StepResult:
        inputs = in_type_of_parameters(inputs, self._theta.dtype)
        targets = self._computer.targets_first(inputs, targets)
        loss, objective, gradient, trace = self._compute(inputs, targets)
        self.step_count = plan.step  # a refused step raises before this line and does not count
        self._update.begin_step(plan.damping)
        if not (math.isfinite(loss) and is_finite(gradient)):
            return self._skipped(plan, loss, objective)
        self._update_factors(plan, inputs, targets, trace)
        self._invert(plan)
        admitted = self._admit(plan)
        gammas = self._update.tried_gammas(
            partial(all_inverted_for, admitted), search=plan.search_gamma
        )
        directions, numbers = self._precondition(gradient, admitted, gammas)
        fisher = self._fisher_products(plan, inputs, targets, directions, trace)
        choice = self._update.choose(numbers, gammas, fisher, lr=plan.lr)
        if not choice.applied:
            return self._skipped(plan, loss, objective)
        self._curvature.shelf.use(admitted, choice.gamma, search_open=self._update.search_open)
        self._apply(plan, choice, directions)
        ratio = self._adapt_damping(plan, choice, objective, inputs, targets)
        return step_result(plan, self._update, (loss, objective), choice, ratio)

    def _compute(
        self, inputs: Tensor, targets: Tensor
    ) -> tuple[float, float, Tensor, Trace | None]:
        """Return the mean loss, the objective, its gradient [P], and the trace of the pass."""
        version = version_of(inputs)
        sums = self._computer.gradient(inputs, targets, self._gradient)
        if version_of(inputs) != version:
            name = type(self._computer.model).__name__
            raise InvalidSpecError(f"KFAC.step: {in_place_message(name)}")
        theta = self._flat.read()
        gradient = sums.gradient.div_(len(inputs)).add_(theta, alpha=self.settings.l2)
        loss = float(sums.loss) / len(inputs)
        return loss, loss + self._flat.l2_term(theta), gradient, sums.trace

    def _skipped(self, plan: StepPlan, loss: float, objective: float) -> StepResult:
        self.numeric_events["bad_step"] += 1
        return step_result(plan, self._update, (loss, objective), None, None)

    def _update_factors(
        self, plan: StepPlan, inputs: Tensor, targets: Tensor, trace: Trace | None
    ) -> None:
        if not plan.update_factors:
            return
        rows = self._subset.positions(len(inputs), self.settings.statistics_fraction)
        statistics = self._computer.statistics(
            rows_at(inputs, rows),
            rows_at(targets, rows),
            step=plan.step,
            links=self._curvature.structure.links,
            bases=self._curvature.shelf.bases(),
            trace=trace and trace.rows_at(rows),
        )
        self._curvature.update(plan.step, statistics, len(rows))

    def _invert(self, plan: StepPlan) -> None:
        if plan.refresh_inverses:
            self._curvature.invert(self._update.requested_gammas(search=plan.search_gamma))

    def _admit(self, plan: StepPlan) -> dict[str, InverseVersion]:
        """Return the inverses that the step uses: the newest ones, unless delays are scripted."""
        shelf = self._curvature.shelf
        only = self._bound.only_admissible(plan.step, self._registration.names)
        return shelf.install(shelf.admit(only))

    def _precondition(
        self,
        gradient: Tensor,
        admitted: Mapping[str, InverseVersion],
        gammas: tuple[float, ...],
    ) -> tuple[Tensor, DirectionNumbers]:
        """Return one direction for each gamma, [C, P], and what the step rule needs of them."""
        inverses = [layer_inverses(nearest_inverses(admitted, gamma)) for gamma in gammas]
        blocks = self._flat.gather(gradient, "gradient")
        solved, fallen = self._directions.compute(self._layout.matrices(blocks), inverses, gammas)
        self.numeric_events["gradient_fallback"] += len(fallen)
        directions, by_block = self._flat.directions(solved)
        numbers = self._flat.numbers(blocks, by_block, self._previous_update)
        return directions, direction_numbers(numbers)

    def _fisher_products(
        self,
        plan: StepPlan,
        inputs: Tensor,
        targets: Tensor,
        directions: Tensor,
        trace: Trace | None,
    ) -> FisherMeans | None:
        fraction = self._update.fisher_fraction(len(inputs), measure=plan.measure)
        if fraction is None:
            return None
        rows = self._subset.positions(len(inputs), fraction)
        vectors = [*directions, self._previous_update]
        traced = trace and trace.rows_at(rows)
        own = rows_at(inputs, rows), rows_at(targets, rows)
        return self._computer.fisher_sums(own[0], vectors, traced, own[1]).mean(len(rows))

    def _apply(self, plan: StepPlan, choice: Choice, directions: Tensor) -> None:
        direction = directions[choice.candidate]
        update = combine(direction, self._previous_update, choice.alpha, choice.mu)
        add_to_parameters(self._parameters, update)
        if self._average is not None:
            self._average.update(plan.step, self._flat.read())

    def _adapt_damping(
        self, plan: StepPlan, choice: Choice, before: float, inputs: Tensor, targets: Tensor
    ) -> float | None:
        if not plan.measure:
            return None
        loss = float(self._computer.loss(inputs, targets)) / len(inputs)
        after = loss + self._flat.l2_term(self._flat.read())
        return self._update.adapt_damping(choice, after - before)

    @property
    def factors(self) -> dict[str, LayerFactors]:
        """The averaged factors of each layer, copied."""
        averages = self._curvature.averages
        return {name: averages.pair(name) for name in averages.names}

    @property
    def averaged_parameters(self) -> Tensor | None:
        """The Polyak average of the parameter vector [P]; None before it starts."""
        return self._average.value if self._average else None

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the direction of each layer, by the inverses in use.

        `gradients` maps a layer to its gradient as a matrix [dim_G, dim_A], whose last column is
        the bias. A block-tridiagonal inverse needs the gradients of all layers.
        """
        with full_precision(self._theta.device):
            return self._curvature.precondition(gradients, self._update.gamma)

    def registration_report(self) -> tuple[ReportRow, ...]:
        """Return one row for each parameter: its block, factor sizes and cost."""
        return self._registration.report

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a second group: the curvature has a block for each parameter from the start.

        Raises:
            InvalidSpecError: the group of the model's parameters is there.
        """
        if self.param_groups:
            raise InvalidSpecError(
                "KFAC.add_param_group: KFAC has one group, the trainable parameters of the model. "
                "Make a new KFAC for the changed model"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Return everything, the model included, for copies and pickles.

        Hooks, and the `step` that a scheduler of torch wraps, stay with the original.
        """
        return {
            key: value
            for key, value in self.__dict__.items()
            if key != "step" and not key.startswith("_optimizer_")
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on, except for the parameters themselves."""
        state = {
            "step_count": self.step_count,
            "update": {
                **self._update.state_dict(),
                "previous_update": self._previous_update.clone(),
            },
            "param_groups": [self._lr.state(self.param_groups[0])],
            **self._curvature.state_dict(),
        }
        if self._average is not None:
            state["average"] = self._average.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a copy of a state that was saved with the same model and options.

        Raises:
            InvalidSpecError: the state belongs to a model with other layers or another size, or to
                another structure of the inverse.
        """
        self._curvature.check_state(state_dict)
        if "update" not in state_dict:
            raise InvalidSpecError("this is a state of KFACPreconditioner, not of KFAC")
        self._flat.check_same_size(state_dict["update"]["previous_update"])
        self._lr.restore(self.param_groups[0], state_dict["param_groups"][0])
        self.step_count = state_dict["step_count"]
        self._update.load_state_dict(state_dict["update"])
        self._previous_update.copy_(state_dict["update"]["previous_update"])
        self._curvature.load_state_dict(state_dict, self._theta)
        if self._average is not None and "average" in state_dict:
            self._average.load_state_dict(state_dict["average"])
