"""The `optimizer` section: K-FAC, and the first-order baselines that run on the same workers.

"Paper" is Martens and Grosse, arXiv:1503.05671.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from kfac_dist.config.section import (
    Count,
    CountOrZero,
    Decay,
    Fraction,
    NonNegative,
    Positive,
    Section,
    raise_problems,
)


def _outside(name: str, value: float | None, low: float, high: float) -> Iterator[str]:
    if value is not None and not low <= value <= high:
        yield f"{name}: {value:g} is not between min {low:g} and max {high:g}"


class ValueSchedule(Section):
    """A value that changes from `initial` to `final` over the steps (paper 13)."""

    schedule: Literal["constant", "cosine", "exponential"]
    """How the value changes; constant keeps `initial` and accepts neither `final` nor `steps`."""
    initial: Positive
    """The value at the start."""
    final: NonNegative | None = None
    """The value at the end."""
    steps: Annotated[int, Field(ge=2)] | None = None
    """The first step at which the value is `final`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_problems(self._problems())
        return self

    def _problems(self) -> Iterator[str]:
        for name, value in (("final", self.final), ("steps", self.steps)):
            if self.schedule == "constant" and value is not None:
                yield f"{name}: {value:g} has no meaning for a constant schedule; leave it out"
            if self.schedule != "constant" and value is None:
                yield f"{name}: is missing; the schedule {self.schedule} needs it"
        if self.schedule == "exponential" and self.final == 0:
            yield "final: 0 is not above 0, and an exponential schedule never reaches 0; use cosine"


class LearningRateSchedule(ValueSchedule):
    """A learning rate that changes from `initial` to `final`, after a warm-up."""

    warmup_steps: CountOrZero = 0
    """Steps in which the rate first rises linearly from 0 to `initial`."""

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.steps is not None and self.warmup_steps >= self.steps:
            yield f"warmup_steps: {self.warmup_steps} is not below steps, {self.steps}"


def _number_or_mapping(value: Any) -> str:
    return "scheduled" if isinstance(value, Mapping | ValueSchedule) else "constant"


LearningRate = Annotated[
    Annotated[Positive, Tag("constant")] | Annotated[LearningRateSchedule, Tag("scheduled")],
    Discriminator(_number_or_mapping),
]
Damping = Annotated[
    Annotated[Positive, Tag("constant")] | Annotated[ValueSchedule, Tag("scheduled")],
    Discriminator(_number_or_mapping),
]


def _number_or_word(value: Any) -> str:
    return "word" if isinstance(value, str) else "constant"


FisherFraction = Annotated[
    Annotated[Fraction, Tag("constant")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(_number_or_word),
]
CountOrAuto = Annotated[
    Annotated[Count, Tag("constant")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(_number_or_word),
]
# `max_factor_dim: auto`. Splitting a layer of about a thousand units in two halves the cost of
# products with its inverses and costs 2 % more steps. A factor of 513, which is 512 units and a
# bias, would gain nothing, so the limit lies well above it.
_AUTO_FACTOR_DIM = 640


class DampingSpec(Section):
    """Levenberg-Marquardt damping, lambda (paper 6.5)."""

    initial: Damping = 0.3
    """lambda in the first step, or its schedule; the paper's autoencoders start with 150."""
    adapt_period: Count | None = 5
    """Steps between two measurements of the reduction ratio; null keeps lambda fixed."""
    min: Positive = 1e-8
    """Lower limit of lambda."""
    max: Positive = 1e8
    """Upper limit of lambda."""
    rho_includes_damping: bool = False
    """Whether the predicted change in the reduction ratio includes the lambda term."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_problems(self._problems())
        return self

    def _problems(self) -> Iterator[str]:
        if not isinstance(self.initial, ValueSchedule):
            yield from _outside("initial", self.initial, self.min, self.max)
            return
        yield from _outside("initial.initial", self.initial.initial, self.min, self.max)
        yield from _outside("initial.final", self.initial.final, self.min, self.max)
        if self.adapt_period is not None:
            yield (
                f"adapt_period: {self.adapt_period} adapts lambda, but the schedule in initial "
                "sets it in each step; use null"
            )

    @property
    def first(self) -> float:
        """The damping in the first step."""
        initial = self.initial
        return initial.initial if isinstance(initial, ValueSchedule) else initial


class GammaSpec(Section):
    """Strength of the factored Tikhonov damping, gamma (paper 6.6)."""

    initial: Positive | None = None
    """gamma in the first step; null means sqrt(lambda + l2)."""
    adapt_period: Count | None = 20
    """Steps between two searches for gamma; null derives gamma from lambda instead."""
    min: Positive = 1e-6
    """Lower limit of gamma."""
    max: Positive = 1e6
    """Upper limit of gamma."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_problems(_outside("initial", self.initial, self.min, self.max))
        return self


class AveragingSpec(Section):
    """Polyak average of the parameters (paper 13); running statistics are not averaged."""

    decay: Decay = 0.99
    """Upper limit of the weight of the old average."""
    start: CountOrZero = 200
    """The average begins after this step."""


class KFACSpec(Section):
    """K-FAC."""

    name: Literal["kfac"] = "kfac"
    """The optimizer."""
    step_rule: Literal["adaptive", "norm_constraint"] = "adaptive"
    """`adaptive`: step size and momentum from exact Fisher; `norm_constraint`: lr and a bound."""
    inverse: Literal["block_diagonal", "block_tridiagonal", "ekfac"] = "block_diagonal"
    """Structure of the approximate inverse: single layers, a chain, or corrected eigenvalues."""
    fisher_type: Literal["mc", "exact", "empirical"] = "mc"
    """Targets for G: sampled from the model, exact expectation, or the training labels (biased)."""
    damping: DampingSpec = DampingSpec()
    """Levenberg-Marquardt damping, lambda."""
    gamma: GammaSpec = GammaSpec()
    """Strength of the factored damping."""
    l2: NonNegative = 1e-5
    """eta in the penalty (eta/2) ||theta||^2 of the objective."""
    factor_decay: Decay = 0.95
    """Upper limit of the weight of the old factors in their running average."""
    factor_update_period: Count = 1
    """Steps between two updates of the factors."""
    inverse_update_period: Count = 20
    """Steps between two refreshes of the inverses."""
    statistics_fraction: Fraction = 0.125
    """Fraction of a batch from which the factors are estimated, tau_1."""
    fisher_fraction: FisherFraction = "auto"
    """Fraction of a batch for exact Fisher products, tau_2; auto adapts it to their noise."""
    pi_norm: Literal["trace", "frobenius"] = "trace"
    """Norm that splits the damping between A and G."""
    precondition_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Type in which inverses are applied: float32 means that of the parameters, auto the faster."""
    weight_sharing: Literal["expand", "reduce"] = "expand"
    """Positions of a case: each counts by itself, or inputs are averaged and gradients summed."""
    fused_outputs: dict[str, Count] = Field(default={"*qkv": 3, "*c_attn": 3, "*in_proj": 3})
    """Linear layers, by pattern of name, whose outputs form this many equal parts, a block each."""
    max_factor_dim: CountOrAuto | None = "auto"
    """Factors of a larger order are split into diagonal sub-blocks. null never splits. auto splits
    above 640, but never for a block_tridiagonal inverse, which links whole layers."""
    diagonal: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Modules or parameters, by pattern of name, that get a diagonal block."""
    averaging: AveragingSpec | None = AveragingSpec()
    """Polyak average of the parameters; null keeps none."""
    lr: LearningRate = 0.1
    """Largest step size of `norm_constraint`, or its schedule."""
    momentum: Decay = 0.9
    """Heavy-ball momentum of `norm_constraint`."""
    norm_constraint: Positive = 1e-3
    """Bound of `norm_constraint` on direction . gradient * step size^2."""

    @property
    def largest_factor(self) -> int | None:
        """The order above which factors are split; None if none is split."""
        if self.max_factor_dim != "auto":
            return self.max_factor_dim
        return None if self.inverse == "block_tridiagonal" else _AUTO_FACTOR_DIM


class SGDSpec(Section):
    """Stochastic gradient descent with momentum, by default Nesterov's."""

    name: Literal["sgd"]
    """The optimizer."""
    lr: LearningRate = 0.01
    """Learning rate, or its schedule."""
    momentum: Decay = 0.9
    """Weight of the previous update in the next one."""
    nesterov: bool = True
    """Nesterov's momentum instead of heavy-ball."""
    l2: NonNegative = 1e-5
    """eta in the penalty (eta/2) ||theta||^2 of the objective."""
    averaging: AveragingSpec | None = AveragingSpec()
    """Polyak average of the parameters; null keeps none."""


class AdamSpec(Section):
    """Adam."""

    name: Literal["adam"]
    """The optimizer."""
    lr: LearningRate = 1e-3
    """Learning rate, or its schedule."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    l2: NonNegative = 1e-5
    """eta in the penalty (eta/2) ||theta||^2 of the objective."""
    averaging: AveragingSpec | None = AveragingSpec()
    """Polyak average of the parameters; null keeps none."""


def _optimizer_name(value: Any) -> str:
    """Return the tag of the section; K-FAC if it has no name."""
    if isinstance(value, Mapping):
        return str(value.get("name", "kfac"))
    return str(getattr(value, "name", "kfac"))


OptimizerSpec = Annotated[
    Annotated[KFACSpec, Tag("kfac")]
    | Annotated[SGDSpec, Tag("sgd")]
    | Annotated[AdamSpec, Tag("adam")],
    Discriminator(_optimizer_name),
]
