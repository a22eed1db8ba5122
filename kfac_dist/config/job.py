"""A job: what to train, on what, by which optimizer, on which workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from kfac_dist.config.optimizers import KFACSpec, OptimizerSpec
from kfac_dist.config.section import Count, CountOrZero, Section, raise_problems

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""Names a folder, too."""


class DataSpec(Section):
    """The data set of a built-in task."""

    name: str | None = "mnist-5k"
    """The data set; a task of your own brings its data and may say null."""
    limit: Count | None = None
    """Only the first so many training and test cases; null is all."""


class BatchSchedule(Section):
    """A batch that grows to the whole training set (section 13)."""

    schedule: Literal["exponential", "cosine"]
    """The kind of growth; the paper's is exponential."""
    initial: Count
    """Cases in the first step."""
    full_at: Annotated[int, Field(ge=2)]
    """The step from which the batch is the whole training set."""


class EvaluationSpec(Section):
    """Evaluation on the whole training and test sets; it always happens at the end."""

    every_steps: Count | None = None
    """Steps from one evaluation to the next; null is only at the end."""


class WorkersSpec(Section):
    """How many processes of each role, and what each may use."""

    gradient: Count = 1
    """Gradient workers; the batch is split among them."""
    inverse: Count = 1
    """Inverse workers; the layers are assigned to them."""
    parameter_server: Count = 1
    """Parameter-server shards; only 1 so far."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where gradient workers and the parameter server compute; auto takes a GPU if there is one."""
    threads: Count | None = None
    """Threads of a gradient worker on the CPU; null is 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.parameter_server != 1:
            raise_problems(
                [f"parameter_server: {self.parameter_server} shards are not supported yet, use 1"]
            )
        return self


class StalenessSpec(Section):
    """How old an inverse may be, in steps, and what follows from it."""

    max_steps: CountOrZero = 40
    """Oldest admissible inverse, in steps; 0 is synchronous."""
    at_bound: Literal["wait", "damp"] = "wait"
    """At the bound, wait for the inverse or use heavier damping for its layer."""
    refresh_policy: Literal["largest_drift", "oldest_first", "round_robin"] = "largest_drift"
    """Which layer an inverse worker refreshes next."""
    warmup_steps: CountOrZero = 0
    """Steps at the start that are synchronous."""
    delay_steps: dict[str, CountOrZero] = Field(default_factory=dict)
    """By layer name pattern: each refresh is used exactly so many steps late, reproducibly."""


class CheckpointSpec(Section):
    """When checkpoints are written, and how many are kept."""

    every_steps: Count | None = 100
    """Steps from one checkpoint to the next; null is never."""
    keep: Count = 3
    """The newest so many stay on disk."""


class FaultSpec(Section):
    """What a job survives."""

    max_restarts: CountOrZero = 3
    """Restarts of inverse workers, and of a job of the service as a whole, before it fails."""
    max_bad_steps: CountOrZero = 10
    """Steps without a finite update before the job fails."""
    min_gradient_workers: Count = 1
    """Fewest gradient workers that the job goes on with."""


def _batch_size_kind(value: Any) -> str:
    return "scheduled" if isinstance(value, Mapping | BatchSchedule) else "constant"


BatchSize = Annotated[
    Annotated[Count, Tag("constant")] | Annotated[BatchSchedule, Tag("scheduled")],
    Discriminator(_batch_size_kind),
]


class JobSpec(Section):
    """A whole job."""

    name: Name
    """Names the run folder: letters, digits, '.', '_' and '-'."""
    task: Annotated[str, Field(min_length=1)]
    """A built-in task, package.module:Class, or file.py:Class relative to the specification."""
    task_args: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of the task."""
    data: DataSpec = DataSpec()
    """The data set of a built-in task."""
    steps: Count
    """The job ends after this step; steps count from 1."""
    batch_size: BatchSize
    """Cases a step, over all gradient workers."""
    optimizer: OptimizerSpec = KFACSpec()
    """K-FAC or a baseline."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of parameters and statistics."""
    seed: CountOrZero = 0
    """Seeds initialisation, batches and sampled targets."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """When the whole training and test sets are evaluated."""
    workers: WorkersSpec = WorkersSpec()
    """Processes of each role."""
    staleness: StalenessSpec = StalenessSpec()
    """How old an inverse may be."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When checkpoints are written."""
    faults: FaultSpec = FaultSpec()
    """What the job survives."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_problems(self._problems())
        return self

    def _problems(self) -> Iterator[str]:
        bound = self.staleness.max_steps
        if (
            isinstance(self.optimizer, KFACSpec)
            and 0 < bound < self.optimizer.inverse_update_period
        ):
            yield (
                f"staleness.max_steps: {bound} is below optimizer.inverse_update_period, "
                f"{self.optimizer.inverse_update_period}, so no inverse could ever be young "
                f"enough; use 0 (synchronous) or at least {self.optimizer.inverse_update_period}"
            )
        yield from self._delay_problems()
        rounded = isinstance(self.optimizer, KFACSpec) and self.optimizer.precondition_dtype
        if self.dtype == "float64" and rounded == "bfloat16":
            yield (
                "optimizer.precondition_dtype: bfloat16 rounds float32, and dtype is float64; use "
                "float32 or auto, which then apply inverses in float64"
            )
        if self.faults.min_gradient_workers > self.workers.gradient:
            yield (
                f"faults.min_gradient_workers: {self.faults.min_gradient_workers} is above "
                f"workers.gradient, {self.workers.gradient}"
            )

    def _delay_problems(self) -> Iterator[str]:
        if not isinstance(self.optimizer, KFACSpec):
            return
        period = self.optimizer.inverse_update_period
        for pattern, delay in self.staleness.delay_steps.items():
            if delay + period > self.staleness.max_steps:
                yield (
                    f"staleness.delay_steps.{pattern}: {delay} and "
                    f"optimizer.inverse_update_period, {period}, make inverses up to "
                    f"{delay + period - 1} steps old; "
                    f"staleness.max_steps, {self.staleness.max_steps}, must be at least "
                    f"{delay + period}"
                )
