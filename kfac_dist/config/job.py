"""The sections of a job: what to train, on which data, how, and on which workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from kfac_dist.config.optimizers import CountOrAuto, KFACSpec, OptimizerSpec
from kfac_dist.config.section import Count, CountOrZero, Positive, Section, raise_problems
from kfac_dist.config.urls import url_problem

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""A name that can also be that of a folder."""


class DataSpec(Section):
    """The data set of a built-in task, and how every data set is read."""

    name: str | None = "mnist-5k"
    """The data set of a built-in task; your own task brings its data and ignores this."""
    limit: Count | None = None
    """Use only this many training and test cases, the first ones; null uses all."""
    num_workers: CountOrZero = 0
    """Processes that read data for each gradient worker; 0 reads in the worker itself."""
    prefetch_batches: CountOrZero = 2
    """Batches read ahead beside the steps; your own data set also needs num_workers."""


class BatchSchedule(Section):
    """A batch that grows to the whole training set (paper 13)."""

    schedule: Literal["exponential", "cosine"]
    """How the batch grows; the paper uses exponential."""
    initial: Count
    """Cases in the batch of the first step."""
    full_at: Annotated[int, Field(ge=2)]
    """The first step whose batch is the whole training set."""


class EvaluationSpec(Section):
    """Evaluation on the training and test sets; there is always one at the end."""

    every_steps: Count | None = None
    """Steps between two evaluations; null evaluates only at the end."""
    limit: Count | None = None
    """Evaluate only this many training and test cases, the first ones; null evaluates all."""


_MOST_FOR_ONE_SHARD = 2  # gradient workers that one shard serves by default


class WorkersSpec(Section):
    """How many processes each role has, and what each may use."""

    gradient: Count = 1
    """Number of gradient workers; the batch is split among them."""
    inverse: Count = 1
    """Number of inverse workers; the layers are assigned to them."""
    parameter_server: CountOrAuto = "auto"
    """Number of parameter-server shards; auto is 1 for one or two gradient workers, and for more
    a shard in the process of each gradient worker."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where gradient workers and the parameter server compute; auto uses a GPU if there is one."""
    inverse_device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where inverse workers compute; auto uses GPUs that the others leave over, else the CPU."""
    threads: Count | None = None
    """CPU threads of each gradient worker; null means 1."""

    @property
    def has_colocated_shards(self) -> bool:
        """Whether each shard shares the process of a gradient worker."""
        return self.parameter_server == "auto" and self.gradient > _MOST_FOR_ONE_SHARD

    @property
    def num_shards(self) -> int:
        """The number of parameter-server shards that are asked for, at least 1."""
        if self.parameter_server != "auto":
            return self.parameter_server
        return self.gradient if self.has_colocated_shards else 1

    @property
    def num_processes_of_group(self) -> int:
        """The number of processes with gradient workers and shards."""
        return self.gradient + (0 if self.has_colocated_shards else self.num_shards)


class StalenessSpec(Section):
    """How many steps old an inverse may be, and what happens at that bound."""

    max_steps: CountOrZero = 40
    """Largest age of an inverse that a step may use, in steps; 0 is synchronous."""
    at_bound: Literal["wait", "damp"] = "wait"
    """At the bound: wait for a newer inverse, or damp the layer more heavily."""
    refresh_policy: Literal["largest_drift", "oldest_first", "round_robin"] = "largest_drift"
    """How an inverse worker chooses the layer to refresh next."""
    warmup_steps: CountOrZero = 0
    """Number of synchronous steps at the start."""
    max_degraded_steps: CountOrZero | None = 40
    """Steps beyond the bound that an inverse is used while its inverse worker is replaced; then
    the job waits for the new worker. null never waits. Synchronous steps always wait."""
    delay_steps: dict[str, CountOrZero] = Field(default_factory=dict)
    """Use each new inverse exactly this many steps late, by pattern of layer name; reproducible."""


class CheckpointSpec(Section):
    """When checkpoints are written, and how many stay on disk."""

    every_steps: Count | None = 100
    """Steps between two checkpoints; null writes none."""
    keep: Count = 3
    """How many checkpoints stay on disk, the newest ones."""


class FaultSpec(Section):
    """Which failures a job survives, and how soon they are noticed."""

    max_restarts: CountOrZero = 3
    """Restarts before the job fails: of inverse workers, and with a server of the whole job."""
    max_preemptions: CountOrZero | None = None
    """Restarts after a notice that a machine is taken away; null does not limit them."""
    max_bad_steps: CountOrZero = 10
    """Steps without a finite update before the job fails."""
    min_gradient_workers: Count = 1
    """Below this number of gradient workers the job waits for room instead of training."""
    stall_seconds: Positive = 20.0
    """A worker whose process does not answer for this long is killed and counts as dead."""
    step_seconds: Positive = 300.0
    """A worker in which one phase of its own work, such as a gradient, lasts longer is killed."""


def _batch_size_kind(value: Any) -> str:
    return "scheduled" if isinstance(value, Mapping | BatchSchedule) else "constant"


BatchSize = Annotated[
    Annotated[Count, Tag("constant")] | Annotated[BatchSchedule, Tag("scheduled")],
    Discriminator(_batch_size_kind),
]


class JobSpec(Section):
    """A job specification."""

    name: Name
    """Name of the job and its run folder: letters, digits, '.', '_' and '-'."""
    task: Annotated[str, Field(min_length=1)]
    """A built-in task, package.module:Class, or file.py:Class relative to the specification."""
    task_args: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of the task."""
    data: DataSpec = DataSpec()
    """The data set of a built-in task."""
    steps: Count
    """The last step of the job; the first is step 1."""
    batch_size: BatchSize
    """Cases in a step, summed over the gradient workers."""
    optimizer: OptimizerSpec = KFACSpec()
    """K-FAC or a baseline."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of the parameters and statistics."""
    seed: CountOrZero = 0
    """Seed of the initialisation, the batches and the sampled targets."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """When the training and test sets are evaluated."""
    workers: WorkersSpec = WorkersSpec()
    """Number of processes of each role."""
    staleness: StalenessSpec = StalenessSpec()
    """How old an inverse may be."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When checkpoints are written."""
    faults: FaultSpec = FaultSpec()
    """How many failures the job survives."""
    storage: str | None = None
    """URL of a folder (s3, gs, file, ...) with a copy of the run, to resume from on any machine."""

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
                f"{self.optimizer.inverse_update_period}, so every inverse would be too old; "
                f"use 0 (synchronous) or at least {self.optimizer.inverse_update_period}"
            )
        yield from self._delay_problems()
        least = self.faults.min_gradient_workers
        if least > self.workers.gradient:
            yield (
                f"faults.min_gradient_workers: {least} is above workers.gradient, "
                f"{self.workers.gradient}; use at most {self.workers.gradient}"
            )
        if self.storage is not None and (problem := url_problem(self.storage)) is not None:
            yield f"storage: {problem}"
        inverse_dtype = isinstance(self.optimizer, KFACSpec) and self.optimizer.precondition_dtype
        if self.dtype == "float64" and inverse_dtype == "bfloat16":
            yield (
                "optimizer.precondition_dtype: bfloat16 rounds float32, and dtype is float64; use "
                "float32 or auto, which then apply inverses in float64"
            )

    def _delay_problems(self) -> Iterator[str]:
        if not isinstance(self.optimizer, KFACSpec):
            return
        period = self.optimizer.inverse_update_period
        for pattern, delay in self.staleness.delay_steps.items():
            if delay + period > self.staleness.max_steps:
                yield (
                    f"staleness.delay_steps.{pattern}: {delay} and "
                    f"optimizer.inverse_update_period, {period}, let an inverse become "
                    f"{delay + period - 1} steps old, so staleness.max_steps, "
                    f"{self.staleness.max_steps}, must be at least {delay + period}"
                )
