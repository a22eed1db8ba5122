"""The driver's loop over the steps; read `run` and `_window` first.

The driver plans a window of steps, sends the orders to all members, waits for their reports and
records them.
What a step computes is in `gradient_worker.work`, `parameter_server.kfac` and
`inverse_worker.work`; what travels between them is in `exchange`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from kfac_dist.coordination.steps.plan import StepPlan
from kfac_dist.coordination.steps.sampling import SamplerCursor, next_window
from kfac_dist.coordination.steps.staleness import degraded_too_long
from kfac_dist.coordination.steps.windows import WindowLength
from kfac_dist.core.statistics.refusals import REFUSALS_TO_WARN_OF, refusal_warning
from kfac_dist.errors import KfacDistError, NumericError
from kfac_dist.runs import Evaluation, RunFolder
from workers.cluster.interrupts import Interrupts
from workers.driver.checkpoint_writer import CheckpointWriter
from workers.driver.checkpointing import ResumePoint, take_snapshot
from workers.driver.crew.crew import Crew
from workers.driver.crew.healing import StepReports
from workers.driver.crew.inverse.inverse_pool import ROLE as INVERSE_ROLE
from workers.driver.crew.inverse.inverse_scaling import replace_preempted
from workers.driver.crew.processes import GroupShape
from workers.driver.evaluator import evaluate_splits
from workers.driver.records.degradation import Degradation
from workers.driver.records.journal import JobJournal
from workers.driver.records.step_records import StepRecords
from workers.driver.rescaling import Rescaling
from workers.exchange.messages import JobContext, RefreshRequest, ServerReport, StepOrder
from workers.planning import batch_size, staleness_bound, step_schedule

_GRACE_SECONDS = 2.0  # after an interrupt, for the current step and its checkpoint


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The end of the loop; `training_seconds` excludes evaluations and checkpoints."""

    evaluation: Evaluation
    num_steps: int
    training_seconds: float


class TrainingLoop:
    """Trains from a resume point to the last step of the specification.

    Args:
        job: the specification, and the script of a replay if this is one.
        folder: the run folder, for checkpoints.
        journal: receives records, events and states.
        step_records: builds a record from the reports of a step.
        point: where to start.
        num_train_cases: the size of the training set.
        interrupts: checked after each step; given a grace period while steps run.
        rescaling: changes the number of workers between steps, as is wished.
        degradation: records what is lost and what has recovered.
    """

    def __init__(
        self,
        job: JobContext,
        folder: RunFolder,
        journal: JobJournal,
        step_records: StepRecords,
        point: ResumePoint,
        num_train_cases: int,
        interrupts: Interrupts,
        rescaling: Rescaling,
        degradation: Degradation,
    ) -> None:
        self._spec = job.spec
        self._replay_script = job.replay_script
        self._interrupts = interrupts
        self._rescaling = rescaling
        self._degradation = degradation
        self._writer = CheckpointWriter(
            folder.places.checkpoints, job.spec.checkpoint.keep, self._note_written
        )
        self._journal = journal
        self._step_records = step_records
        self._num_train_cases = num_train_cases
        self._schedule = step_schedule(job.spec)
        self._bound = staleness_bound(job.spec, job.replay_script)
        self._cursor = point.cursor
        self._statistics_step = point.statistics_step
        self._first_step = point.step + 1
        self._checkpointed_step = point.step
        self._gammas: tuple[float, ...] = ()
        self._versions: Mapping[str, int] = {}  # of the inverses in use
        self._bad_steps = 0
        self._warned_of_refusals = False
        self._training_seconds = 0.0
        self._window_length = WindowLength()

    def run(self, crew: Crew) -> TrainingResult:
        """Do all remaining steps, write a checkpoint, and evaluate.

        Raises:
            KfacDistError: the job failed; its newest checkpoint stays usable.
            KeyboardInterrupt: the job was interrupted.
        """
        try:
            return self._run(crew)
        except Exception:
            self._finish_after_failure()
            raise
        except KeyboardInterrupt:
            self._writer.wait(_GRACE_SECONDS)
            raise

    def _run(self, crew: Crew) -> TrainingResult:
        crew.step = self._first_step - 1
        self._gammas = crew.surviving(lambda: crew.next_gammas(self._first_step))
        self._interrupts.grace_seconds = _GRACE_SECONDS
        step = self._first_step
        while step <= self._spec.steps:
            crew.surviving(lambda: self._prepare(crew))
            step = self._window(crew, step) + 1
            self._writer.look()
            if self._replay_script or self._is_due(crew.step, self._spec.checkpoint.every_steps):
                self._checkpoint(crew)
            if self._interrupts.requested:
                self._checkpoint(crew)
                self._writer.finish(self._interrupts.check)
                raise KeyboardInterrupt
            self._leave_preempted(crew)
        # Not set yet if the run resumes at its last step and only evaluates.
        crew.step = self._journal.step = self._spec.steps
        self._checkpoint(crew)
        self._writer.finish(self._interrupts.check)
        self._interrupts.grace_seconds = 0.0
        return TrainingResult(
            evaluation=self._evaluate(crew),
            num_steps=self._spec.steps + 1 - self._first_step,
            training_seconds=self._training_seconds,
        )

    def _finish_after_failure(self) -> None:
        """Let a checkpoint that is on its way reach the disk; the failure is what is shown."""
        with suppress(KfacDistError):
            self._writer.finish(self._interrupts.check)

    @staticmethod
    def _is_due(step: int, period: int | None) -> bool:
        return period is not None and step % period == 0

    def _prepare(self, crew: Crew) -> None:
        """Take in what has started since the last window, and wait for what steps need."""
        step = crew.step + 1
        if self._replay_script is not None:
            crew.resize(self._replay_script.gradient_workers.get(step))
        crew.maintain()
        self._connect_started(crew, step)
        self._limit_degradation(crew, step)
        self._rescale(crew, step)

    def _window(self, crew: Crew, first: int) -> int:
        """Order the steps of a window from all actors, record them, and return the last one."""
        started = time.perf_counter()
        orders, cursors = self._orders(crew, first)
        shape = crew.shape  # another one if a member is lost in this window
        reports = crew.run(orders)
        seconds = time.perf_counter() - started
        self._training_seconds += seconds
        if not reports:  # a member was lost in the first step of the window
            return first - 1
        self._cursor, self._gammas = cursors[len(reports) - 1], reports[-1].server.next_gammas
        self._window_length.note(seconds, [report.server.step_seconds for report in reports])
        crew.inverse_pool.poll()
        crew.keep_copies()
        for order, report in zip(orders, reports, strict=False):
            self._note(crew, order.plan, report, shape)
        return first + len(reports) - 1

    def _orders(self, crew: Crew, first: int) -> tuple[list[StepOrder], list[SamplerCursor]]:
        """Return the orders of the next steps, and the position in the data after each.

        A window ends with a step after which the driver has to do something. It also ends before a
        step that would have to wait if an inverse worker died now: the driver waits only between
        windows.
        """
        orders, cursors, cursor = [], [], self._cursor
        for step in range(first, first + self._window_length.steps):
            if step > first and self._degraded_too_long(step, self._versions):
                break
            size = batch_size(self._spec, step, self._num_train_cases)
            window, cursor = next_window(cursor, size, self._num_train_cases)
            orders.append(StepOrder(plan=self._schedule.plan(step), window=window))
            cursors.append(cursor)
            if self._ends_window(crew, step):
                break
        return orders, cursors

    def _ends_window(self, crew: Crew, step: int) -> bool:
        return (
            step == self._spec.steps
            or self._evaluates(step)
            or self._is_due(step, self._spec.checkpoint.every_steps)
            or (self._replay_script is not None and self._replay_script.ends_window(step))
            or bool(crew.inverse_pool.orphaned)
        )

    def _note(self, crew: Crew, plan: StepPlan, reports: StepReports, shape: GroupShape) -> None:
        """Record a step, and draw the conclusions from its reports."""
        self._journal.step = crew.step = plan.step
        server = reports.server
        if plan.update_factors:
            self._statistics_step = plan.step
        self._versions = server.inverse_version_step or self._versions
        self._check_recovery(crew, server)
        statuses = crew.inverse_pool.statuses()
        record = self._step_records.record(
            server, reports.workers, statuses, shape, is_incomplete=reports.is_incomplete
        )
        if self._evaluates(plan.step):
            evaluation = self._evaluate(crew)
            record = record.model_copy(update={"evaluation": evaluation})
        self._journal.record(record)
        self._warn_of_refusals(server)
        self._count_bad_steps(server)

    def _evaluate(self, crew: Crew) -> Evaluation:
        return crew.surviving(lambda: evaluate_splits(crew, self._journal, self._spec.optimizer.l2))

    def _evaluates(self, step: int) -> bool:
        if self._replay_script is not None:
            return step in self._replay_script.evaluation_steps
        return self._is_due(step, self._spec.evaluation.every_steps)

    def _connect_started(self, crew: Crew, step: int) -> None:
        """Connect the inverse workers that have started since the last step.

        They are asked for inverses at once, made from the first statistics that reach them.
        """
        started = crew.inverse_pool.note_started(step)
        if not started:
            return
        crew.connect_inverse_workers()
        if not self._bound.is_exact(step):  # else it has all requests that are due
            self._request_first(crew, step, started)
        for rank in started:
            pid = crew.inverse_pool.pid(rank)
            self._journal.event(
                "inverse_worker_replaced",
                f"inverse worker {rank} is back as a new process (pid {pid})",
                role=INVERSE_ROLE,
                rank=rank,
                pid=pid,
                restarts=crew.inverse_pool.num_deaths,
            )

    def _request_first(self, crew: Crew, step: int, ranks: Sequence[int]) -> None:
        """Ask workers for inverses from the first statistics that they get, in `step` or later."""
        first = step
        while not self._schedule.plan(first).update_factors:
            first += 1
        request = RefreshRequest(step=first, gammas=self._gammas, min_statistics_step=first)
        crew.inverse_pool.request(request, ranks)

    def _rescale(self, crew: Crew, step: int) -> None:
        """Change the number of workers if that is wished for, and can be done now."""
        changed = self._rescaling.advance(crew, step, self._statistics_step)
        # In an exact run everything that was asked for has been made before the layers moved.
        if changed and not self._bound.is_exact(step):
            self._request_first(crew, step, changed)

    def _leave_preempted(self, crew: Crew) -> None:
        """Replace inverse workers that have notice, and write a checkpoint before others leave.

        Those leave, and are replaced, before the next window.
        """
        for member in crew.preempted():
            if member.role == INVERSE_ROLE:
                replace_preempted(crew, member.rank, self._statistics_step)
            else:
                self._checkpoint(crew)
                self._writer.finish(self._interrupts.check)

    def _limit_degradation(self, crew: Crew, step: int) -> None:
        """Wait for successors of inverse workers whose layers have been degraded for too long.

        A successor can make an inverse only in a step that computes statistics. Exact steps wait
        for it anyway.
        """
        if self._bound.is_exact(step) or not self._schedule.plan(step).update_factors:
            return
        late = self._degraded_too_long(step, crew.inverse_pool.orphaned)
        if not late:
            return
        if ranks := crew.inverse_pool.starting(late):
            self._journal_wait(step, ranks, late)
            crew.await_inverse_workers(late)
        self._connect_started(crew, step)
        crew.stop_degrading(late)

    def _degraded_too_long(self, step: int, layers: Collection[str]) -> dict[str, int]:
        most = self._spec.staleness.max_degraded_steps
        return degraded_too_long(step, self._versions, self._bound, layers, most)

    def _journal_wait(self, step: int, ranks: Sequence[int], late: Mapping[str, int]) -> None:
        oldest = max(late, key=late.__getitem__)
        message = (
            f"step {step} waits until inverse worker {', '.join(map(str, ranks))} is back: the "
            f"inverse of {oldest} is {late[oldest]} steps beyond its bound, and "
            f"staleness.max_degraded_steps is {self._spec.staleness.max_degraded_steps}"
        )
        self._journal.state("DEGRADED", reason="inverse_worker_died", message=message)
        kind = "inverse_worker_awaited"
        self._journal.event(kind, message, severity="warning", role=INVERSE_ROLE)

    def _check_recovery(self, crew: Crew, report: ServerReport) -> None:
        """Set the job to RUNNING again once no layer is orphaned any more."""
        versions = report.inverse_version_step
        oldest = {name: self._bound.oldest_admissible(report.step, name) for name in versions}
        exact = self._bound.is_exact(report.step)
        recovered = crew.inverse_pool.note_versions(versions, oldest, is_exact=exact)
        if recovered and not crew.inverse_pool.orphaned:
            self._degradation.note_recovered_inverses()

    def _warn_of_refusals(self, report: ServerReport) -> None:
        if report.refused_in_a_row >= REFUSALS_TO_WARN_OF and not self._warned_of_refusals:
            self._warned_of_refusals = True
            message = refusal_warning(report.step)
            self._journal.event("statistics_refused", message, severity="warning")

    def _count_bad_steps(self, report: ServerReport) -> None:
        self._bad_steps = 0 if report.applied else self._bad_steps + 1
        most = self._spec.faults.max_bad_steps
        if self._bad_steps > most:
            raise NumericError(
                f"{self._bad_steps} steps in a row up to step {report.step} gave no finite update "
                f"(loss {report.loss:g}), faults.max_bad_steps is {most}"
            )

    def _checkpoint(self, crew: Crew) -> None:
        """Write a checkpoint of the step just done, if one is wanted and it has none yet."""
        if self._checkpointed_step == crew.step or not self._wants_checkpoint(crew.step):
            return
        crew.surviving(lambda: self._connect_started(crew, crew.step + 1))
        self._writer.finish(self._interrupts.check)
        snapshot = crew.surviving(
            lambda: take_snapshot(crew, statistics_step=self._statistics_step, cursor=self._cursor)
        )
        self._checkpointed_step = crew.step
        self._writer.start(snapshot.content)
        if snapshot.num_missing:
            self._journal.event(
                "factors_missing",
                f"{snapshot.num_missing} inverse workers provided no factors for the checkpoint of "
                f"step {crew.step}, which has their previous ones",
                severity="warning",
            )

    def _note_written(self, step: int) -> None:
        self._journal.event("checkpoint", f"checkpoint of step {step} written", step=step)

    def _wants_checkpoint(self, step: int) -> bool:
        if self._replay_script is not None:
            return step in self._replay_script.checkpoint_steps
        return self._spec.checkpoint.every_steps is not None
