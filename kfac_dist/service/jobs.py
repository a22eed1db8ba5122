"""What may be done with jobs; every way into the control plane ends here.

Synchronous and thread-safe. Every method raises KfacDistError subclasses only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kfac_dist.coordination.lifecycle import JobState
from kfac_dist.runs.checkpoints import CheckpointInfo
from kfac_dist.service.records import (
    Attempt,
    Job,
    JobEvent,
    MetricSeries,
    Report,
    ReportAnswer,
)
from kfac_dist.service.store import Store


class Jobs:
    """The jobs in `store`; run folders are in `home`."""

    def __init__(self, store: Store, home: Path) -> None:
        self._store = store
        self._home = home

    def create(
        self,
        spec: Mapping[str, Any],
        *,
        owner: str,
        priority: int = 0,
        idempotency_key: str | None = None,
        package: bytes | None = None,
        data_dir: str | None = None,
    ) -> Job:
        """Accept a job: check it and make it durable. It is PENDING.

        `package` is a zip of the folder that user code is looked for in. The same key with the
        same request gives the job that is there.

        Raises:
            InvalidSpecError: the specification or the package is wrong, with every problem.
            ConflictError: the key was used for another request.
        """
        raise NotImplementedError

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            NotFoundError: there is none of this id.
        """
        raise NotImplementedError

    def attempts(self, job_id: str) -> list[Attempt]:
        """Return the attempts of a job, first to last."""
        raise NotImplementedError

    def list(
        self,
        *,
        states: Iterable[JobState] = (),
        owner: str | None = None,
        name: str | None = None,
        page_size: int = 50,
        page_token: str = "",
    ) -> tuple[list[Job], str]:
        """Return a page of jobs, newest first, and the token of the next, empty at the end.

        Raises:
            UsageError: the token is not one of this listing's.
        """
        raise NotImplementedError

    def cancel(self, job_id: str, *, now: bool = False) -> Job:
        """Let a job end; `now` without waiting for its step and checkpoint.

        Raises:
            ConflictError: it has ended.
        """
        raise NotImplementedError

    def pause(self, job_id: str) -> Job:
        """Let a job leave a checkpoint and end, to be resumed.

        Raises:
            ConflictError: it has ended or is being cancelled.
        """
        raise NotImplementedError

    def resume(self, job_id: str) -> Job:
        """Let a paused job go on.

        Raises:
            ConflictError: it is not paused.
        """
        raise NotImplementedError

    def retry(self, job_id: str) -> Job:
        """Let a failed or cancelled job go on at its newest checkpoint.

        Raises:
            ConflictError: it has not ended, or succeeded.
        """
        raise NotImplementedError

    def events(self, job_id: str, *, after: int = 0, limit: int = 500) -> list[JobEvent]:
        """Return events with a sequence above `after`, in order."""
        raise NotImplementedError

    def metric_names(self, job_id: str) -> list[str]:
        """Return the names of all metrics that the job has a history of."""
        raise NotImplementedError

    def metrics(
        self,
        job_id: str,
        names: Sequence[str],
        *,
        first_step: int | None = None,
        last_step: int | None = None,
        max_points: int = 1000,
    ) -> list[MetricSeries]:
        """Return histories in the order of `names`, thinned out to at most `max_points` each.

        Raises:
            NotFoundError: the job has no metric of this name.
        """
        raise NotImplementedError

    def checkpoints(self, job_id: str) -> list[CheckpointInfo]:
        """Return the job's checkpoints, newest first, not verified."""
        raise NotImplementedError

    def log_dir(self, job_id: str) -> Path:
        """Where the logs of the job's roles are; the folder may not be there yet."""
        raise NotImplementedError

    def check_report_token(self, job_id: str, attempt: int, token: str) -> bool:
        """Whether `token` is the secret that the driver of this attempt was given."""
        raise NotImplementedError

    def report(self, report: Report) -> ReportAnswer:
        """Take up what a driver tells, and answer what it is to do."""
        raise NotImplementedError

    def wait_for_change(self, job_id: str, revision: int, timeout_seconds: float) -> Job | None:
        """Return the job once its revision is above `revision`, None when the time is over."""
        raise NotImplementedError

    def subscribe(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call `listener` with the id of each job that changes, on any thread; returns its end.

        An asyncio server hands it to its loop with `call_soon_threadsafe`: no thread a watcher.
        """
        raise NotImplementedError
