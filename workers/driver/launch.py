"""A job in the foreground, from its specification to its summary.

`run_job` checks, starts Ray and the actors, trains, evaluates, and takes everything down again,
whatever happens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from kfac_dist.config import JobSpec
from kfac_dist.coordination.jobs.placement import check_placement
from kfac_dist.coordination.steps.recorded import ReplayScript
from kfac_dist.errors import FirstFailure
from kfac_dist.runs import (
    Failure,
    JobSummary,
    RunFolder,
    RunIdentity,
    RunState,
    WorkerCounts,
)
from kfac_dist.runs.records import Severity
from kfac_dist.runs.report import render_report
from workers.cluster.cluster import Cluster, is_embedded, local_cluster, ray_cluster
from workers.device import plan_devices
from workers.driver.checkpointing import BEGINNING, ResumePoint, averages_step, find_resume_point
from workers.driver.crew.crew import Crew, CrewPlan
from workers.driver.preparation import Preparation, prepare
from workers.driver.records.journal import JobJournal, OnEvent, OnRecord
from workers.driver.records.metrics_server import MetricsServer
from workers.driver.records.step_records import StepRecords
from workers.driver.training_loop import TrainingLoop, TrainingResult
from workers.exchange.messages import InverseSetup, JobContext
from workers.interrupts import Interrupts
from workers.planning import arithmetic_of, inverse_setups

_GROUP_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    state: RunState
    result: TrainingResult | None = None
    reason: str | None = None
    message: str | None = None
    first_failure: FirstFailure | None = None


def run_job(
    spec: JobSpec,
    *,
    base_dir: Path,
    data_dir: Path | None,
    home: Path,
    run_dir: Path | None,
    resume: bool,
    on_record: OnRecord | None = None,
    on_event: OnEvent | None = None,
    metrics: MetricsServer | None = None,
    ray_address: str | None = None,
    identity: RunIdentity | None = None,
    interrupts: Interrupts | None = None,
    replay_script: ReplayScript | None = None,
) -> JobSummary:
    """Run `spec` to its end and return the summary, which is also in the run folder.

    User files of a task are looked for in `base_dir`; `home` has the data cache and, without
    `run_dir`, the run folders. `resume` goes on with the run in the folder at its newest whole
    checkpoint. `metrics` serves the job's while it runs. `identity` is what the run is called. An
    interrupt, also by `interrupts`, ends everything within seconds, leaves a checkpoint where the
    step in hand ends in time, and is raised again. With a `replay_script` the job repeats what is
    recorded, on this machine however many CPUs it has.

    Raises:
        KfacDistError: the job cannot start, or failed; a JobFailedError leaves a summary.
    """
    if is_embedded(ray_address) and replay_script is None:
        _check_placement(spec, local_cluster())
    preparation = prepare(spec, base_dir=base_dir, data_dir=data_dir, cache_dir=home / "data")
    path = run_dir or home / "runs" / spec.name
    with _open_folder(path, spec, resume, identity) as folder:
        point = find_resume_point(folder, spec.steps) if resume else None
        if point is not None:
            folder.begin_attempt(
                spec, identity
            )  # only now: an error before leaves the run as it was
        job = JobContext(
            job=folder.read_job().job,
            attempt=folder.read_job().attempt,
            spec=spec,
            base_dir=base_dir,
            data_dir=data_dir,
            cache_dir=home / "data",
            run_dir=folder.path,
            replay_script=replay_script,
        )
        journal = JobJournal(folder, job.attempt)
        with journal.served(metrics, job.job):
            journal.watch(on_record, on_event)
            run = _Run(job, folder, journal, preparation, point, interrupts or Interrupts())
            return run.run(ray_address)


def _open_folder(
    path: Path, spec: JobSpec, resume: bool, identity: RunIdentity | None
) -> RunFolder:
    return RunFolder.resume(path, spec) if resume else RunFolder.create(path, spec, identity)


def _check_placement(spec: JobSpec, cluster: Cluster) -> None:
    check_placement(spec.workers, cluster.num_cpus, cluster.num_inverse_slots)


class _Run:
    """One attempt of a job, in a folder of its own."""

    def __init__(
        self,
        job: JobContext,
        folder: RunFolder,
        journal: JobJournal,
        preparation: Preparation,
        resume_point: ResumePoint | None,
        interrupts: Interrupts,
    ) -> None:
        self._job = job
        self._folder = folder
        self._journal = journal
        self._preparation = preparation
        self._resume_point = resume_point
        self._interrupts = interrupts
        self._step_records = StepRecords()
        self._started = time.monotonic()

    def run(self, ray_address: str | None) -> JobSummary:
        """Train, and leave state, summary and report in the folder, also of a failure."""
        try:
            result = self._train(ray_address)
        except KeyboardInterrupt:
            ending = self._interrupts.ends_as
            self._finish(_Outcome(state=ending, reason="interrupted", message="interrupted"))
            raise
        except Exception as error:
            self._finish(_Outcome(state="FAILED", **Failure.from_error(error)._asdict()))
            raise
        return self._finish(_Outcome(state="SUCCEEDED", result=result))

    def _train(self, ray_address: str | None) -> TrainingResult:
        self._preparation.check_data()
        point = self._find_start()
        room_for = self._job.spec.workers if self._job.replay_script else None
        with ray_cluster(ray_address, room_for) as cluster, self._interrupts:
            _check_placement(self._job.spec, cluster)
            loop = TrainingLoop(
                self._job,
                self._folder,
                self._journal,
                self._step_records,
                point,
                self._preparation.num_train_cases,
                self._interrupts,
            )
            plan = self._plan_crew(cluster, point)
            crew = Crew(
                self._job, self._folder, plan, loop.on_inverse_worker_death, self._interrupts
            )
            try:
                precondition = crew.build().precondition
                arithmetic = arithmetic_of(self._job.spec, plan.devices, precondition)
                self._journal.started(precondition, arithmetic)
                return loop.run(crew)
            finally:
                crew.kill()

    def _find_start(self) -> ResumePoint:
        point = self._resume_point
        if point is None:
            return BEGINNING
        self._journal.step = point.step
        for message in point.refused:
            self._journal.event("checkpoint_refused", message, severity="warning")
        self._folder.truncate_metrics_after(point.step)
        self._step_records = StepRecords(self._folder.read_metrics())
        where = f"from the checkpoint of step {point.step}" if point.step else "from the start"
        message = f"attempt {self._job.attempt} goes on {where}"
        self._journal.event("resumed", message, from_step=point.step)
        return point

    def _plan_crew(self, cluster: Cluster, point: ResumePoint) -> CrewPlan:
        spec = self._job.spec
        return CrewPlan(
            devices=plan_devices(spec.workers, cluster.num_gpus),
            host=cluster.host,
            group_timeout_seconds=_GROUP_TIMEOUT_SECONDS,
            setups=self._inverse_setups(point),
            server_snapshot=point.server_snapshot,
            averages=point.averages,
            buffers=point.buffers,
            has_buffers=self._preparation.has_buffers,
        )

    def _inverse_setups(self, point: ResumePoint) -> list[InverseSetup]:
        registration = self._preparation.registration
        if registration is None:
            return []
        return inverse_setups(self._job.spec, registration, averages_step(point.averages))

    def _finish(self, outcome: _Outcome) -> JobSummary:
        summary = self._summary(outcome)
        self._folder.write_summary(summary)
        self._journal.state(
            outcome.state,
            reason=outcome.reason,
            message=outcome.message,
            first_failure=outcome.first_failure,
        )
        severity: Severity = "error" if outcome.state == "FAILED" else "info"
        message = outcome.message or f"the job ended after step {self._journal.step}"
        self._journal.event(outcome.state.lower(), message, severity=severity)
        render_report(self._folder)
        return summary

    def _summary(self, outcome: _Outcome) -> JobSummary:
        workers, result = self._job.spec.workers, outcome.result
        evaluation = result.evaluation if result else None
        seconds = result.training_seconds if result else 0.0
        return JobSummary(
            job=self._job.job,
            state=outcome.state,
            step=self._journal.step,
            train=evaluation.train if evaluation else None,
            test=evaluation.test if evaluation else None,
            train_averaged=evaluation.train_averaged if evaluation else None,
            test_averaged=evaluation.test_averaged if evaluation else None,
            initial_objective=self._step_records.initial_objective,
            wall_seconds=time.monotonic() - self._started,
            steps_per_second=result.num_steps / seconds if result and seconds else None,
            inverse_staleness_steps=self._step_records.staleness(),
            workers=WorkerCounts(
                gradient=workers.gradient,
                inverse=workers.inverse,
                parameter_server=workers.parameter_server,
            ),
            run_dir=str(self._folder.path),
            reason=outcome.reason,
            message=outcome.message,
            first_failure=outcome.first_failure,
        )
