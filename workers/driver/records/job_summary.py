"""The result of a job, from how its training ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kfac_dist.errors import FirstFailure
from kfac_dist.runs import JobSummary, RunState, WorkerCounts
from workers.driver.records.step_records import StepRecords
from workers.driver.training_loop import TrainingResult
from workers.exchange.messages import JobContext


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended, as a state and why; `result` is there if it did all its steps."""

    state: RunState
    result: TrainingResult | None = None
    reason: str | None = None
    message: str | None = None
    first_failure: FirstFailure | None = None


def job_summary(
    job: JobContext,
    outcome: Outcome,
    records: StepRecords,
    *,
    step: int,
    num_shards: int,
    wall_seconds: float,
    run_dir: Path,
    at_end: WorkerCounts | None,
) -> JobSummary:
    """Return the summary of a job.

    Args:
        job: the job.
        outcome: how this attempt ended.
        records: what was remembered of the steps.
        step: the last one.
        num_shards: of the parameter server, at the start.
        wall_seconds: how long this attempt took.
        run_dir: the run folder.
        at_end: the processes at the end; None if none were started.
    """
    workers, result = job.spec.workers, outcome.result
    evaluation = result.evaluation if result else None
    seconds = result.training_seconds if result else 0.0
    return JobSummary(
        job=job.job,
        state=outcome.state,
        step=step,
        train=evaluation.train if evaluation else None,
        test=evaluation.test if evaluation else None,
        train_averaged=evaluation.train_averaged if evaluation else None,
        test_averaged=evaluation.test_averaged if evaluation else None,
        initial_objective=records.initial_objective,
        wall_seconds=wall_seconds,
        steps_per_second=result.num_steps / seconds if result and seconds else None,
        inverse_staleness_steps=records.staleness(),
        workers=WorkerCounts(
            gradient=workers.gradient, inverse=workers.inverse, parameter_server=num_shards
        ),
        workers_at_end=at_end,
        run_dir=str(run_dir),
        reason=outcome.reason,
        message=outcome.message,
        first_failure=outcome.first_failure,
    )
