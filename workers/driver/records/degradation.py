"""What is lost in a job, as events and states: it is DEGRADED until everything is there again."""

from __future__ import annotations

from collections.abc import Sequence

from kfac_dist.coordination.steps.staleness import StalenessBound
from kfac_dist.errors import WorkerDiedError
from kfac_dist.runs.records import Severity
from workers.driver.crew.deaths import InverseWorkerDied, named
from workers.driver.crew.inverse.inverse_pool import ROLE as INVERSE_ROLE
from workers.driver.crew.losses import GroupChange, NoticeKind
from workers.driver.records.group_events import record_change
from workers.driver.records.journal import JobJournal

_MOST_NAMED = 5


class Degradation:
    """Records losses in `journal`, and whether the job lacks gradient workers or inverses.

    `bound` says which steps wait for a successor. More deaths of inverse workers than
    `max_restarts` end the job.
    """

    def __init__(self, journal: JobJournal, bound: StalenessBound, max_restarts: int) -> None:
        self._journal = journal
        self._bound = bound
        self._max_restarts = max_restarts
        self._lacks_workers = self._lacks_inverses = False

    def note_recovered_inverses(self) -> None:
        """Record that no layer is orphaned any more."""
        self._lacks_inverses = False
        if not self._lacks_workers:
            self._journal.state("RUNNING", reason=None, message=None)
        self._journal.event(
            "recovered",
            "all layers have inverses within the staleness bound again",
        )

    def on_group_change(self, change: GroupChange) -> None:
        """Record that a member of the group was lost, has left or has joined."""
        message = record_change(self._journal, change)
        was_degraded, self._lacks_workers = self._lacks_workers, change.is_degraded
        if change.is_degraded:
            self._journal.state("DEGRADED", reason="gradient_workers_missing", message=message)
        elif was_degraded and not self._lacks_inverses:
            self._journal.state("RUNNING", reason=None, message=None)

    def on_group_notice(self, kind: NoticeKind, message: str) -> None:
        """Record what keeps the group from being as it is wished."""
        severity: Severity = "info" if kind == "scale_waits" else "warning"
        self._journal.event(kind, message, severity=severity)
        if kind == "members_awaited":
            self._lacks_workers = True
            self._journal.state("DEGRADED", reason="gradient_workers_missing", message=message)

    def on_inverse_worker_death(self, death: InverseWorkerDied) -> None:
        """Record a death and set the job to DEGRADED; it continues with the last good inverses.

        Raises:
            WorkerDiedError: more workers have died than `faults.max_restarts` allows.
        """
        layers = ", ".join(death.layers)
        how = f"{death.exit}: {death.why}" if death.why else death.exit
        then = "it had no layers yet"
        if layers:
            then = f"training continues with the last inverses of {layers}"
            if self._bound.is_exact(self._journal.step + 1):
                then = f"steps that need new inverses of {layers} wait for its successor"
        message = f"{named(f'inverse worker {death.rank}', death.pid)} died ({how}); {then}"
        self._journal.event(
            "inverse_worker_died",
            message,
            severity="warning",
            role=INVERSE_ROLE,
            rank=death.rank,
            pid=death.pid,
            exit=death.exit,
            layers=list(death.layers),
        )
        most = self._max_restarts
        if death.num_deaths > most:
            raise WorkerDiedError(
                f"inverse workers died {death.num_deaths} times, faults.max_restarts is {most}; "
                f"the last one was {death.rank} ({how})"
            )
        if death.layers:
            self._lacks_inverses = True
            self._journal.state("DEGRADED", reason="inverse_worker_died", message=message)

    def on_lost_statistics(self, rank: int, steps: Sequence[int]) -> None:
        """Record that the successor of an inverse worker cannot get the statistics of `steps`."""
        named_steps = ", ".join(map(str, steps[:_MOST_NAMED])) + (
            f" and {len(steps) - _MOST_NAMED} more" if len(steps) > _MOST_NAMED else ""
        )
        self._journal.event(
            "statistics_lost",
            f"the new inverse worker {rank} continues without the statistics of steps "
            f"{named_steps}: the processes that had kept them are gone, or had no room",
            severity="warning",
            role=INVERSE_ROLE,
            rank=rank,
            steps=list(steps),
        )
