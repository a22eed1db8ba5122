"""Runs a job in this process, from its specification to its summary.

`run_job` checks the job, starts Ray and the actors, trains and evaluates. Whatever happens, it
takes everything down again and records how the job ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kfac_dist._home import data_cache, runs_dir
from kfac_dist.config import JobSpec
from kfac_dist.coordination.jobs.placement import check_admitted, check_placement
from kfac_dist.coordination.steps.recorded import ReplayScript
from kfac_dist.errors import JobFailedError, KfacDistError
from kfac_dist.runs import (
    Failure,
    JobSummary,
    RunFolder,
    RunIdentity,
)
from kfac_dist.runs.records import Severity
from kfac_dist.runs.reports.report import render_report
from kfac_dist.runs.transfer.fetch import local_folder
from kfac_dist.tasks import working_folder
from workers.cluster.cluster import Cluster, Owner, is_embedded, local_room, ray_cluster
from workers.cluster.interrupts import Interrupts
from workers.cluster.leftovers import ended_with_block, marking
from workers.cluster.lost import ray_errors_end_the_job
from workers.device import plan_devices
from workers.driver.checkpointing import START, ResumePoint, find_resume_point
from workers.driver.crew.crew import Crew
from workers.driver.crew.losses import Observer
from workers.driver.crew.processes import CrewPlan
from workers.driver.evaluator import divergence
from workers.driver.other_nodes import other_nodes
from workers.driver.preparation import Preparation, prepare
from workers.driver.records.degradation import Degradation
from workers.driver.records.job_summary import Outcome, job_summary
from workers.driver.records.journal import JobJournal, OnEvent, OnRecord
from workers.driver.records.metrics_server import MetricsServer
from workers.driver.records.step_records import StepRecords
from workers.driver.rescaling import Rescaling
from workers.driver.stored_run import Finish, mirrored, open_run, storage_of
from workers.driver.training_loop import TrainingLoop, TrainingResult
from workers.driver.wishes import WishBox
from workers.exchange.messages import InverseSetup, JobContext
from workers.exchange.shard_plan import ShardPlan
from workers.planning import (
    arithmetic_of,
    has_mirrors,
    inverse_setups,
    layer_costs,
    room_for_replay,
    shard_plan,
    staleness_bound,
)

_UPLOAD_SECONDS = 120.0  # at the end, for what is not in the storage yet
_LAST_UPLOAD_SECONDS = 10.0  # the same after an interrupt


def run_job(
    spec: JobSpec,
    *,
    base_dir: Path,
    data_dir: Path | str | None,
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
    wishes: WishBox | None = None,
) -> JobSummary:
    """Run a job to its end and return the summary, which is also written to the run folder.

    An interrupt ends everything within seconds. It leaves a checkpoint if the current step
    finishes in time, and is raised again.

    Args:
        spec: the job.
        base_dir: the folder of the user's files that a task may need.
        data_dir: the folder in which data are looked for first, before the cache; or a URL, whose
            files every node of the job fetches into its cache.
        home: has the data cache and, without `run_dir`, the run folders.
        run_dir: the run folder.
        resume: continue the run in the folder from its newest whole checkpoint.
        on_record: called with each step that was recorded.
        on_event: called with each event that was recorded.
        metrics: serves the job's metrics while it runs.
        ray_address: the cluster to use, instead of an embedded one.
        identity: the job's name and attempt in its records, if a control plane has given them.
        interrupts: lets other threads interrupt the job; signals always do.
        replay_script: what to repeat of a recorded run. The workers then always fit on this
            machine, however many CPUs it has.
        wishes: lets other threads change the number of workers.

    Raises:
        KfacDistError: the job cannot start, or failed; a JobFailedError leaves a summary.
        KeyboardInterrupt: the job was interrupted.
    """
    if is_embedded(ray_address) and replay_script is None:
        check_placement(spec.workers, local_room())
    cache_dir, data_url = data_cache(home), data_dir if isinstance(data_dir, str) else None
    local = local_folder(data_dir, cache_dir)
    with ended_with_block() as mark:
        with marking(mark):
            preparation = prepare(spec, base_dir=base_dir, data_dir=local, cache_dir=cache_dir)
        path = run_dir or runs_dir(home) / spec.name
        storage = None if replay_script else storage_of(spec, identity)
        opened = open_run(path, spec, storage, resume=resume, identity=identity)
        with opened.folder as folder:
            point = _resume_point(folder, spec, preparation) if opened.resumes else None
            if point is not None:
                # Only now, so that an error in what comes before leaves the run as it was.
                folder.begin_attempt(spec, identity)
            job = JobContext(
                job=folder.read_job().job,
                attempt=folder.read_job().attempt,
                spec=spec,
                base_dir=base_dir,
                data_dir=local,
                cache_dir=cache_dir,
                run_dir=folder.path,
                replay_script=replay_script,
                allowed_targets=preparation.allowed_targets,
            )
            journal = JobJournal(folder, job.attempt)
            journal.watch(on_record, on_event)
            with (
                journal.served(metrics, job.job),
                mirrored(opened, storage, job.attempt, journal) as finish,
            ):
                surroundings = _Surroundings(mark=mark, data_url=data_url, finish=finish)
                attempt = _JobAttempt(
                    job,
                    folder,
                    journal,
                    preparation,
                    point,
                    interrupts or Interrupts(),
                    surroundings,
                    wishes or WishBox(),
                )
                return attempt.run(ray_address, is_admitted=identity is not None)


def _resume_point(folder: RunFolder, spec: JobSpec, preparation: Preparation) -> ResumePoint:
    registration = preparation.registration
    return find_resume_point(
        folder,
        spec.steps,
        has_factors=registration is not None and bool(layer_costs(registration)),
        has_buffers=preparation.has_buffers,
    )


@dataclass(frozen=True, kw_only=True)
class _Surroundings:
    """What an attempt needs beside the job.

    `mark` is that of its processes, `data_url` where nodes fetch data sets from, None for folders.
    `finish` ends the mirror in the storage.
    """

    mark: str
    data_url: str | None
    finish: Finish


class _JobAttempt:
    """One attempt of a job: trains, and records how it ends."""

    def __init__(
        self,
        job: JobContext,
        folder: RunFolder,
        journal: JobJournal,
        preparation: Preparation,
        resume_point: ResumePoint | None,
        interrupts: Interrupts,
        surroundings: _Surroundings,
        wishes: WishBox,
    ) -> None:
        self._job = job
        self._folder = folder
        self._journal = journal
        self._preparation = preparation
        self._resume_point = resume_point
        self._interrupts = interrupts
        self._surroundings = surroundings
        self._mark = surroundings.mark
        self._wishes = wishes
        self._step_records = StepRecords()
        self._started = time.monotonic()
        self._crew: Crew | None = None  # once it was launched

    def run(self, ray_address: str | None, *, is_admitted: bool) -> JobSummary:
        """Train and evaluate; even after a failure the folder has state, summary and report.

        `is_admitted` says that a server found room for the job on the cluster before.
        """
        try:
            result = self._train(ray_address, is_admitted)
        except KeyboardInterrupt:
            ending = self._interrupts.ends_as
            self._try_to_finish(Outcome(state=ending, reason="interrupted", message="interrupted"))
            raise
        except Exception as error:
            self._try_to_finish(Outcome(state="FAILED", **Failure.from_error(error)._asdict()))
            raise
        return self._finish(self._judged(result))

    def _judged(self, result: TrainingResult) -> Outcome:
        """Return the outcome of a training that has done all its steps, for better or worse."""
        objective = result.evaluation.train["objective"]
        diverged = divergence(self._step_records.initial_objective, objective)
        if diverged is None:
            return Outcome(state="SUCCEEDED", result=result)
        self._journal.event("diverged", diverged, severity="warning")
        return Outcome(state="SUCCEEDED", result=result, reason="diverged", message=diverged)

    def _try_to_finish(self, outcome: Outcome) -> None:
        """Record how the run ended; where that is refused, what ended it is still what is shown."""
        with suppress(JobFailedError):  # the folder is gone, or its disk is full
            self._finish(outcome)

    def _train(self, ray_address: str | None, is_admitted: bool) -> TrainingResult:
        with marking(self._mark):
            partial_checks = self._preparation.check_data()
        for message in partial_checks:
            self._journal.event("data_checked_in_part", message, severity="warning")
        point = self._find_start()
        room_for = room_for_replay(self._job.spec.workers, self._job.replay_script)
        owner = Owner(mark=self._mark, run_dir=self._folder.path)
        with (
            ray_errors_end_the_job(),
            # Ray lets its workers import from the working folder before anything else. In the
            # user's folder a file such as `queue.py` would hide the standard library; nothing is
            # in this one.
            working_folder(self._folder.path),
            ray_cluster(ray_address, room_for, owner) as cluster,
            self._interrupts,
            ExitStack() as stack,
        ):
            self._check_room(cluster, is_admitted)
            job, catch_up_logs = stack.enter_context(
                other_nodes(
                    self._job, self._surroundings.data_url, are_possible=cluster.host is None
                )
            )
            degradation = self._degradation()
            loop = TrainingLoop(
                job,
                self._folder,
                self._journal,
                self._step_records,
                point,
                self._preparation.num_train_cases,
                self._interrupts,
                self._rescaling(),
                degradation,
            )
            plan = self._plan_crew(cluster, point, catch_up_logs)
            crew = Crew.launch(
                job,
                self._folder,
                plan,
                self._interrupts,
                degradation.on_inverse_worker_death,
                Observer(
                    on_change=degradation.on_group_change, on_notice=degradation.on_group_notice
                ),
                degradation.on_lost_statistics,
            )
            self._crew = crew
            try:
                ready = crew.build()
                arithmetic = arithmetic_of(
                    self._job.spec, plan.devices, ready.precondition_dtype, ready.float32_precision
                )
                self._journal.started(ready.precondition_dtype, arithmetic)
                return loop.run(crew)
            finally:
                crew.kill()

    def _degradation(self) -> Degradation:
        spec = self._job.spec
        bound = staleness_bound(spec, self._job.replay_script)
        return Degradation(self._journal, bound, spec.faults.max_restarts)

    def _rescaling(self) -> Rescaling:
        registration = self._preparation.registration
        layers = () if registration is None else layer_costs(registration)
        return Rescaling(self._job.spec.workers, layers, self._wishes, self._journal)

    def _check_room(self, cluster: Cluster, is_admitted: bool) -> None:
        workers = self._job.spec.workers
        if is_admitted:
            check_admitted(workers, cluster.room)
        else:
            check_placement(workers, cluster.room, where="the cluster")

    def _find_start(self) -> ResumePoint:
        """Return where training starts, and bring the records back to that step."""
        point = self._resume_point
        if point is None:
            return START
        self._journal.step = point.step
        for message in point.refused:
            self._journal.event("checkpoint_refused", message, severity="warning")
        self._folder.truncate_metrics_after(point.step)
        self._step_records = StepRecords(self._folder.read_metrics())
        where = f"from the checkpoint of step {point.step}" if point.step else "from the start"
        message = f"attempt {self._job.attempt} continues {where}"
        self._journal.event("resumed", message, from_step=point.step)
        return point

    def _plan_crew(
        self, cluster: Cluster, point: ResumePoint, catch_up_logs: Callable[[], None]
    ) -> CrewPlan:
        spec, registration = self._job.spec, self._preparation.registration
        return CrewPlan(
            devices=plan_devices(spec.workers, cluster.room.num_gpus),
            host=cluster.host,
            plan_shards=self._plan_shards(),
            shards=self._shards(),
            layers=registration.names if registration else (),
            setups=self._inverse_setups(point),
            server_snapshot=point.server_snapshot,
            averages=point.averages,
            buffers=point.buffers,
            has_buffers=self._preparation.has_buffers,
            has_mirrors=has_mirrors(spec),
            start_step=point.step,
            catch_up_logs=catch_up_logs,
        )

    def _plan_shards(self) -> Callable[[int], ShardPlan]:
        preparation = self._preparation
        return partial(
            shard_plan, self._job.spec, preparation.registration, preparation.num_parameters
        )

    def _shards(self) -> ShardPlan:
        return self._plan_shards()(self._job.spec.workers.num_shards)

    def _inverse_setups(self, point: ResumePoint) -> list[InverseSetup]:
        registration = self._preparation.registration
        if registration is None:
            return []
        return inverse_setups(self._job.spec, registration, point.statistics_step)

    def _finish(self, outcome: Outcome) -> JobSummary:
        summary = job_summary(
            self._job,
            outcome,
            self._step_records,
            step=self._journal.step,
            num_shards=len(self._shards()),
            wall_seconds=time.monotonic() - self._started,
            run_dir=self._folder.path,
            at_end=self._crew.counts if self._crew else None,
        )
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
        self._render_report()
        seconds = _UPLOAD_SECONDS if outcome.reason != "interrupted" else _LAST_UPLOAD_SECONDS
        return self._surroundings.finish(summary, seconds)

    def _render_report(self) -> None:
        """Render the report; what is wrong with a record is a warning, the run ended as it did."""
        damages: list[str] = []
        try:
            render_report(self._folder, damages)
        except (KfacDistError, OSError) as error:
            damages.append(f"report.html could not be written: {error}")
        for damage in damages:
            self._journal.event("records_damaged", damage, severity="warning")
