"""Successors of inverse workers: the members send to them at once, and what they lack first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ray

from kfac_dist.coordination.steps.kept_statistics import CatchUp, plan_catch_up
from kfac_dist.coordination.steps.plan import StepSchedule
from workers.driver.crew.failures import failed_among, finished
from workers.driver.crew.inverse.inverse_pool import InversePool
from workers.driver.crew.processes import Calls, GroupProcess, call
from workers.member.outbox import SentReport

OnLoss = Callable[[int, Sequence[int]], None]
"""Receives the rank of an inverse worker and the steps whose statistics it cannot get."""


class Successors:
    """Lets each successor catch up; `on_loss` is called where it cannot.

    `processes` returns the present members of the group.
    """

    def __init__(
        self,
        schedule: StepSchedule,
        inverse_pool: InversePool,
        processes: Callable[[], Sequence[GroupProcess]],
        on_loss: OnLoss,
    ) -> None:
        self._schedule = schedule
        self._inverse_pool = inverse_pool
        self._processes = processes
        self._on_loss = on_loss
        self._catching_up: dict[int, Calls] = {}  # by rank; empty until the successor has started

    def reconnect(self, rank: int) -> None:
        """Have the members send to the successor of an inverse worker, first what it lacks.

        This can be in the middle of a step, which may wait for that worker's inverses.
        """
        pool = self._inverse_pool
        arguments = pool.handles, pool.assignment_epochs, pool.copied_steps
        call(self._processes(), "reconnect", arguments)
        self._catching_up[rank] = {}

    def catch_up(self, step: int) -> None:
        """Tell successors that have started what to expect, from what the members have sent.

        `step` is the last one that is done.
        """
        for rank, calls in list(self._catching_up.items()):
            if rank not in self._inverse_pool.assignment:
                del self._catching_up[rank]
            elif not calls and self._inverse_pool.has_started(rank):
                asked = call(self._processes(), "sent_to", [rank])
                self._catching_up[rank] = asked
            elif calls and len(finished(calls)) == len(calls):
                failed = failed_among(calls)
                reports = ray.get([ref for ref in calls if ref not in failed])
                plan = self._tell_what_to_expect(rank, reports, step)
                del self._catching_up[rank]
                if plan.lost:
                    self._on_loss(rank, plan.lost)

    def keep_copies(self) -> None:
        """Keep what inverse workers have copied; members forget the statistics in it."""
        if self._inverse_pool.take_copies():
            copied = self._inverse_pool.copied_steps
            for process in self._processes():
                process.handle.forget_statistics.remote(copied)

    def _tell_what_to_expect(
        self, rank: int, reports: Sequence[SentReport], last_step: int
    ) -> CatchUp:
        """Tell a successor which steps to expect, and return them with those that are lost.

        Args:
            rank: that of the successor, which has started.
            reports: what it was sent until now by the members that could be asked.
            last_step: the last step that was done, if none of them has sent statistics.
        """
        pool = self._inverse_pool
        worker, layers = pool.process(rank), pool.assignment[rank]
        sent = [report.last_step for report in reports if report.last_step is not None]
        plan = plan_catch_up(
            self._statistics_steps(worker.setup.applied_step, max(sent, default=last_step)),
            layers,
            [report.layers for report in reports],
            done_step=min(sent, default=last_step),
        )
        worker.handle.expect.remote(plan.steps)
        worker.lacks_nothing = not plan.lost
        if plan.lost:
            for owner in dict.fromkeys(pool.orphans.owners.values()):
                owner.lose_statistics.remote(layers, plan.lost[-1])
        return plan

    def _statistics_steps(self, after: int, last: int) -> list[int]:
        steps = range(after + 1, last + 1)
        return [step for step in steps if self._schedule.plan(step).update_factors]
