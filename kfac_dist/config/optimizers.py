"""The `optimizer` section: K-FAC, and the first-order baselines that run on the same workers.

Equation and section numbers are those of Martens and Grosse, arXiv:1503.05671.
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
    """A value that goes from `initial` to `final` over the steps (section 13)."""

    schedule: Literal["constant", "cosine", "exponential"]
    """How it goes; constant stays at `initial` and takes neither `final` nor `steps`."""
    initial: Positive
    """The value before it begins to change."""
    final: NonNegative | None = None
    """The value that it ends at."""
    steps: Annotated[int, Field(ge=2)] | None = None
    """The step from which on the value is `final`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_problems(self._problems())
        return self

    def _problems(self) -> Iterator[str]:
        for name, value in (("final", self.final), ("steps", self.steps)):
            if self.schedule == "constant" and value is not None:
                yield f"{name}: {value:g} has no meaning for a constant schedule, leave it out"
            if self.schedule != "constant" and value is None:
                yield f"{name}: is missing; a schedule that is {self.schedule} needs it"
        if self.schedule == "exponential" and self.final == 0:
            yield "final: 0 is not above 0, which an exponential schedule never reaches; use cosine"


class LearningRateSchedule(ValueSchedule):
    """A learning rate that goes from `initial` to `final`, after a warm-up."""

    warmup_steps: CountOrZero = 0
    """The rate rises linearly from 0 to `initial` over so many steps, then goes its way."""

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
FactorDim = Annotated[
    Annotated[Count, Tag("constant")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(_number_or_word),
]
# Layers of about a thousand units are cut in two, which halves the products with the inverses and
# costs two steps in a hundred; what is a little above 512, as with a bias, gains nothing from it.
_AUTO_FACTOR_DIM = 640


class DampingSpec(Section):
    """Levenberg-Marquardt damping, lambda (section 6.5)."""

    initial: Damping = 3.0
    """lambda before the first step, or its schedule; the paper's autoencoders had 150."""
    adapt_period: Count | None = 5
    """Steps from one measurement of the reduction ratio to the next; null keeps lambda fixed."""
    min: Positive = 1e-8
    """lambda is never moved below this."""
    max: Positive = 1e8
    """lambda is never moved above this."""
    rho_includes_damping: bool = False
    """Whether the change that the reduction ratio compares with includes the lambda term."""

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
                f"adapt_period: {self.adapt_period} adapts lambda, which the schedule in initial "
                "sets in each step; use null"
            )

    @property
    def first(self) -> float:
        """The damping of the first step."""
        initial = self.initial
        return initial.initial if isinstance(initial, ValueSchedule) else initial


class GammaSpec(Section):
    """Strength of the factored Tikhonov damping, gamma (section 6.6)."""

    initial: Positive | None = None
    """gamma before the first step; null is sqrt(lambda + l2)."""
    adapt_period: Count | None = 20
    """Steps from one search for gamma to the next; null derives gamma from lambda instead."""
    min: Positive = 1e-6
    """gamma is never moved below this."""
    max: Positive = 1e6
    """gamma is never moved above this."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_problems(_outside("initial", self.initial, self.min, self.max))
        return self


class AveragingSpec(Section):
    """Polyak average of the parameters (section 13); running statistics of the model are not."""

    decay: Decay = 0.99
    """Weight of the old average, at most."""
    start: CountOrZero = 200
    """The step after which the average begins."""


class KFACSpec(Section):
    """K-FAC."""

    name: Literal["kfac"] = "kfac"
    """The optimizer."""
    step_rule: Literal["adaptive", "norm_constraint"] = "adaptive"
    """`adaptive`: step and momentum from the exact Fisher; `norm_constraint`: lr and a bound."""
    inverse: Literal["block_diagonal", "block_tridiagonal", "ekfac"] = "block_diagonal"
    """Structure of the approximate inverse: layers apart, a chain, or corrected eigenvalues."""
    fisher_type: Literal["mc", "exact", "empirical"] = "mc"
    """Targets for G: sampled from the model, its exact Fisher, or the training labels (biased)."""
    damping: DampingSpec = DampingSpec()
    """Levenberg-Marquardt damping, lambda."""
    gamma: GammaSpec = GammaSpec()
    """Strength of the factored damping."""
    l2: NonNegative = 1e-5
    """eta of the penalty (eta/2) ||theta||^2 in the objective."""
    factor_decay: Decay = 0.95
    """Weight of the old factors in their running average, at most."""
    factor_update_period: Count = 1
    """Steps from one batch of statistics to the next."""
    inverse_update_period: Count = 20
    """Steps from one refresh of the inverses to the next."""
    statistics_fraction: Fraction = 0.125
    """Fraction of a batch that the factors are estimated on, tau_1."""
    fisher_fraction: FisherFraction = "auto"
    """Fraction of a batch for exact Fisher products, tau_2; auto follows their measured noise."""
    pi_norm: Literal["trace", "frobenius"] = "trace"
    """Norm that splits the damping between A and G."""
    precondition_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Inverses are applied in the type of the parameters, rounded, or rounded if that is faster."""
    weight_sharing: Literal["expand", "reduce"] = "expand"
    """Positions of one case: each counts for itself, or inputs averaged and gradients summed."""
    fused_outputs: dict[str, Count] = Field(default={"*qkv": 3, "*c_attn": 3, "*in_proj": 3})
    """Linear layers, by pattern of name, whose outputs are so many equal parts, a block each."""
    max_factor_dim: FactorDim | None = "auto"
    """Factors of a larger order are split into diagonal sub-blocks; null is never, auto above 640,
    but never for a block_tridiagonal inverse, whose links are of whole layers."""
    diagonal: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Modules or parameters, by pattern of the name, that get a diagonal block."""
    averaging: AveragingSpec | None = AveragingSpec()
    """Polyak average of the parameters; null is none."""
    lr: LearningRate = 0.1
    """Largest step of `norm_constraint`, or its schedule."""
    momentum: Decay = 0.9
    """Heavy-ball momentum of `norm_constraint`."""
    norm_constraint: Positive = 1e-3
    """Bound on direction . gradient * step^2, of `norm_constraint`."""

    @property
    def largest_factor(self) -> int | None:
        """The order above which factors are split; None where none is."""
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
    """Weight of the last update in the next."""
    nesterov: bool = True
    """Nesterov's momentum instead of heavy-ball."""
    l2: NonNegative = 1e-5
    """eta of the penalty (eta/2) ||theta||^2 in the objective."""
    averaging: AveragingSpec | None = AveragingSpec()
    """Polyak average of the parameters; null is none."""


class AdamSpec(Section):
    """Adam."""

    name: Literal["adam"]
    """The optimizer."""
    lr: LearningRate = 1e-3
    """Learning rate, or its schedule."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    l2: NonNegative = 1e-5
    """eta of the penalty (eta/2) ||theta||^2 in the objective."""
    averaging: AveragingSpec | None = AveragingSpec()
    """Polyak average of the parameters; null is none."""


def _optimizer_name(value: Any) -> str:
    """The tag of the section; K-FAC where no name is given."""
    if isinstance(value, Mapping):
        return str(value.get("name", "kfac"))
    return str(getattr(value, "name", "kfac"))


OptimizerSpec = Annotated[
    Annotated[KFACSpec, Tag("kfac")]
    | Annotated[SGDSpec, Tag("sgd")]
    | Annotated[AdamSpec, Tag("adam")],
    Discriminator(_optimizer_name),
]
