"""The folder of a run: who may write into it, and its records (`run_places` has the names)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from kfac_dist.config import JobSpec, dump_spec, load_spec
from kfac_dist.errors import ConflictError, NotFoundError, UsageError
from kfac_dist.runs.json_lines import Journal, tolerated
from kfac_dist.runs.lock import FolderLock, is_held
from kfac_dist.runs.parsing import parse_record, read_whole
from kfac_dist.runs.records import ENDED, Event, JobRecord, JobSummary, RunRecord
from kfac_dist.runs.resume import check_same_job
from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.runs.step_record import StepRecord
from kfac_dist.runs.writing import record_of_run, write_whole

_Record = TypeVar("_Record", bound=RunRecord)


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The job and the attempt that a run belongs to, when somebody else numbers them."""

    job: str
    attempt: int


class RunFolder:
    """A run's folder: one process writes into it, any number read.

    `create` and `resume` take the lock of the folder and return a writer, to be used as a context
    manager or closed; `open` returns a reader.
    """

    def __init__(self, path: Path, lock: FolderLock | None) -> None:
        """Call `create`, `resume` or `open` instead."""
        self.path = path
        self.places = RunPlaces(path)
        self._lock = lock
        self._metrics = Journal(self.places.metrics)
        self._events = Journal(self.places.events)

    @classmethod
    def create(cls, path: Path, spec: JobSpec, identity: RunIdentity | None = None) -> RunFolder:
        """Begin a new run in `path`, which is created if it does not exist.

        Without `identity` the run gets a new job id, and this is its first attempt.

        Raises:
            UsageError: `path` cannot be a folder.
            ConflictError: the folder holds a run already, or another process works in it.
        """
        folder = cls(path.absolute(), _lock(path))
        with _unlock_on_error(folder):
            _refuse_occupied(path)
            folder.places.logs.mkdir(exist_ok=True)
            folder.places.checkpoints.mkdir(exist_ok=True)
            folder.write_spec(spec)
            folder._write_job(_first_record(spec, identity))
        return folder

    @classmethod
    def resume(cls, path: Path, spec: JobSpec) -> RunFolder:
        """Take the lock of the run in `path`, and change nothing; `begin_attempt` comes next.

        Raises:
            NotFoundError: there is no run in `path`.
            ConflictError: another process works in it, or `spec` describes another job.
        """
        if not RunPlaces(path).has_run:
            raise NotFoundError(_nothing_to_resume(path))
        folder = cls(path.absolute(), _lock(path))
        with _unlock_on_error(folder):
            check_same_job(folder.read_spec(), spec, path)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the run in `path` for reading.

        Raises:
            NotFoundError: there is no run in `path`.
        """
        places = RunPlaces(path)
        if not places.has_run:
            raise NotFoundError(f"{path}: not the folder of a run, it has no {places.job.name}")
        return cls(path.absolute(), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and release the lock."""
        self._metrics.close()
        self._events.close()
        if self._lock is not None:
            self._lock.release()

    def begin_attempt(self, spec: JobSpec, identity: RunIdentity | None = None) -> None:
        """Begin the next attempt of a resumed run, with a `spec` that `check_same_job` accepts.

        Without `identity` its number is that of the last attempt plus one.
        """
        self.write_spec(spec)
        self.places.summary.unlink(missing_ok=True)  # it would contradict job.json
        attempt = identity.attempt if identity else self.read_job().attempt + 1
        self.update_job(
            state="STARTING", attempt=attempt, reason=None, message=None, first_failure=None
        )

    def write_spec(self, spec: JobSpec) -> None:
        """Write the resolved specification."""
        with record_of_run(self.places.spec):
            write_whole(self.places.spec, dump_spec(spec))

    def update_job(self, **changes: Any) -> JobRecord:
        """Change fields of the job's record, set `updated_at` to now, and return the new record."""
        with record_of_run(self.places.job):
            before = read_whole(JobRecord, self.places.job)
        values = before.model_dump() | changes | {"updated_at": time.time()}
        record = JobRecord.model_validate(values)
        self._write_job(record)
        return record

    def append_metrics(self, record: StepRecord) -> None:
        """Append the record of a step."""
        self._metrics.append(record.model_dump_json())

    def append_event(self, event: Event) -> None:
        """Append an event."""
        self._events.append(event.model_dump_json())

    def write_summary(self, summary: JobSummary) -> None:
        """Write the result of the job."""
        with record_of_run(self.places.summary):
            write_whole(self.places.summary, summary.model_dump_json(indent=2) + "\n")

    def truncate_metrics_after(self, step: int) -> None:
        """Remove the records after `step`: a resumed attempt will repeat those steps."""
        kept = [record for record in self.read_metrics() if record.step <= step]
        self._metrics.replace(record.model_dump_json() for record in kept)

    def read_spec(self) -> JobSpec:
        """Read the resolved specification."""
        return load_spec(self.places.spec)

    def read_job(self) -> JobRecord:
        """Read the state of the job.

        A reader gets the newest step of an unfinished run from the journal, since `job.json` is
        written only when the state changes. If no process works on it, it is INTERRUPTED.
        """
        job = read_whole(JobRecord, self.places.job)
        if self._lock is not None or job.state in ENDED:
            return job
        return self._unfinished(is_worked_on=is_held(self.path))

    def _unfinished(self, *, is_worked_on: bool) -> JobRecord:
        """Return the state of a run, which as far as is known has not ended."""
        step = self._metrics.newest("step")
        job = read_whole(JobRecord, self.places.job)  # read again, as it may have just ended
        if job.state in ENDED:
            return job
        changes: dict[str, Any] = {"step": max(job.step, step)}
        if not is_worked_on:
            message = f"its process ended while the run was {job.state}, without recording why"
            changes |= {"state": "INTERRUPTED", "reason": "driver_died", "message": message}
        return job.model_copy(update=changes)

    def read_summary(self) -> JobSummary | None:
        """Read the result of the job; None before it has ended."""
        path = self.places.summary
        return read_whole(JobSummary, path) if path.exists() else None

    def read_metrics(self, damages: list[str] | None = None) -> list[StepRecord]:
        """Read the steps in ascending order.

        Where a resumed attempt repeated a step, its record hides the earlier records of this step
        and of all later ones. A last line that a kill cut short is skipped. With `damages`, damaged
        records are left out, and what is wrong is appended to it.

        Raises:
            KfacDistError: a record is damaged.
        """
        records: list[StepRecord] = []
        for record in self._parsed(self._metrics, StepRecord, damages):
            while records and records[-1].step >= record.step:
                records.pop()
            records.append(record)
        return records

    def read_events(self, damages: list[str] | None = None) -> list[Event]:
        """Read the events in the order they were written; `damages` as in `read_metrics`."""
        return list(self._parsed(self._events, Event, damages))

    @staticmethod
    def _parsed(
        journal: Journal, model: type[_Record], damages: list[str] | None
    ) -> Iterator[_Record]:
        for values in journal.read(damages):
            found: list[_Record] = []
            with tolerated(damages):
                found.append(parse_record(model, values, journal.path))
            yield from found

    def _write_job(self, record: JobRecord) -> None:
        with record_of_run(self.places.job):
            write_whole(self.places.job, record.model_dump_json(indent=2) + "\n")


def _first_record(spec: JobSpec, identity: RunIdentity | None) -> JobRecord:
    own = identity or RunIdentity(job=f"{spec.name}-{secrets.token_hex(4)}", attempt=1)
    now = time.time()
    return JobRecord(
        job=own.job, attempt=own.attempt, state="STARTING", created_at=now, updated_at=now
    )


def _lock(path: Path) -> FolderLock:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return FolderLock(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be a run folder: {error.strerror}") from error


@contextmanager
def _unlock_on_error(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except BaseException:
        folder.close()
        raise


def check_folder(path: Path, spec: JobSpec, *, resume: bool) -> None:
    """Raise what `create` or `resume` would raise, without changing anything.

    Raises:
        ConflictError: the folder is occupied, or the run to resume is another job.
        NotFoundError: there is no run to resume.
    """
    if RunPlaces(path).has_run:
        _lock(path).release()
        if resume:
            check_same_job(RunFolder.open(path).read_spec(), spec, path)
        else:
            _refuse_occupied(path)
    elif resume and spec.storage is None:  # from a storage it would be fetched
        raise NotFoundError(_nothing_to_resume(path))


def _nothing_to_resume(path: Path) -> str:
    return f"{path}: no run to resume here; leave out --resume to start one"


def _refuse_occupied(path: Path) -> None:
    """Raise ConflictError if there is a run; the lock was free, so no process works on it."""
    if not RunPlaces(path).has_run:
        return
    job = RunFolder.open(path)._unfinished(is_worked_on=False)
    raise ConflictError(
        f"{path}: this folder holds the run of job {job.job} ({job.state}, step {job.step}). "
        "Continue it with --resume, or choose another folder with --run-dir"
    )
