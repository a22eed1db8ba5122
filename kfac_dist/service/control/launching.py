"""Prepares an attempt: its row in the store, then what its driver reads in the run folder.

The order is row, folder, cluster. A server that dies in between later finds an attempt that the
cluster does not know, and submits it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import Session

from kfac_dist.coordination.jobs.lifecycle import JobState, Trigger
from kfac_dist.runs.parsing import read_whole
from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.runs.transfer.package import unpack_whole
from kfac_dist.runs.writing import write_secret, write_whole
from kfac_dist.service.access.tokens import hash_secret
from kfac_dist.service.job_records import Job
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.store import AttemptRow, JobRow
from kfac_dist.service.store.job_rows import move, note
from kfac_dist.service.submission import package_path


class Launch(BaseModel):
    """What the driver of an attempt should run: `launch.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str
    attempt: int
    resume: bool
    spec: dict[str, Any]
    home: Path
    data_dir: str | None


def begin_attempt(session: Session, row: JobRow, token: str, *, resumes: bool, now: float) -> None:
    """Add the row of the job's next attempt; `token` is the secret of its driver."""
    row.attempt += 1
    row.summary = None  # the previous attempt's
    trigger = Trigger.RELAUNCH if resumes else Trigger.LAUNCH
    move(session, row, trigger, now, message=_starting(row.attempt))
    session.add(
        AttemptRow(
            job=row.number,
            number=row.attempt,
            state=JobState.RESUMING if resumes else JobState.STARTING,
            started_at=now,
            token_sha256=hash_secret(token),
        )
    )
    note(session, row, "attempt_started", f"attempt {row.attempt} was given to the cluster", now)


def _starting(attempt: int) -> str:
    return f"attempt {attempt}: its driver starts, and loads the task and its data"


def prepare_folder(jobs: Jobs, job: Job, token: str) -> None:
    """Write the launch file, the token and the code for the driver of the newest attempt.

    Raises:
        InvalidSpecError: the user's code cannot be unpacked.
    """
    folder = Path(job.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    places = RunPlaces(folder)
    if job.package is not None and not places.code.exists():
        unpack_whole(package_path(jobs.home, job.package).read_bytes(), places.code)
    launch = Launch(
        job=job.id,
        attempt=job.attempt,
        # A later attempt may find the run in its storage.
        resume=places.has_run or (job.attempt > 1 and job.spec.get("storage") is not None),
        spec=dict(job.spec),
        home=jobs.home,
        data_dir=job.data_dir or None,
    )
    write_secret(places.report_token, token)
    write_whole(places.launch, launch.model_dump_json(indent=2) + "\n")


def read_launch(run_dir: Path) -> Launch:
    """Read what the driver should run."""
    return read_whole(Launch, RunPlaces(run_dir).launch)


def read_token(run_dir: Path) -> str:
    """Read the driver's secret."""
    return RunPlaces(run_dir).report_token.read_text()
