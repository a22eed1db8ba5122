"""From a row to what a driver finds in its run folder: the attempt, its secret, the code.

The row is written before the folder, and the folder before the cluster is asked: a server that
dies between them finds an attempt of which the cluster knows nothing, and asks again.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import Session

from kfac_dist.coordination.jobs.lifecycle import JobState, Trigger
from kfac_dist.runs.parsing import read_whole
from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.runs.writing import write_secret, write_whole
from kfac_dist.service.job_records import Job
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.store import AttemptRow, JobRow
from kfac_dist.service.store.job_rows import move, note
from kfac_dist.service.submission import package_path
from kfac_dist.service.wire.package import unpack


class Launch(BaseModel):
    """What the driver of an attempt is to run: `launch.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str
    attempt: int
    resume: bool
    spec: dict[str, Any]
    home: Path
    data_dir: Path | None


def token_sha256(token: str) -> str:
    """Return what is stored of a driver's secret."""
    return hashlib.sha256(token.encode()).hexdigest()


def begin_attempt(session: Session, row: JobRow, token: str, *, resumes: bool, now: float) -> None:
    """Write the row of the next attempt; `token` is the secret of its driver."""
    row.attempt += 1
    row.summary = None  # of the attempt before
    event = Trigger.RELAUNCH if resumes else Trigger.LAUNCH
    move(session, row, event, now, message=f"attempt {row.attempt} waits for its driver")
    session.add(
        AttemptRow(
            job=row.number,
            number=row.attempt,
            state=JobState.RESUMING if resumes else JobState.STARTING,
            started_at=now,
            token_sha256=token_sha256(token),
        )
    )
    note(session, row, "attempt_started", f"attempt {row.attempt} was given to the cluster", now)


def prepare_folder(jobs: Jobs, job: Job, token: str) -> None:
    """Write what the driver of the job's newest attempt finds.

    Raises:
        InvalidSpecError: the user's code does not unpack.
    """
    folder = Path(job.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    places = RunPlaces(folder)
    if job.package is not None and not places.code.exists():
        _unpack(package_path(jobs.home, job.package), places.code)
    launch = Launch(
        job=job.id,
        attempt=job.attempt,
        resume=places.has_run,
        spec=dict(job.spec),
        home=jobs.home,
        data_dir=Path(job.data_dir) if job.data_dir else None,
    )
    write_secret(places.report_token, token)
    write_whole(places.launch, launch.model_dump_json(indent=2) + "\n")


def read_launch(run_dir: Path) -> Launch:
    """Read what the driver is to run."""
    return read_whole(Launch, RunPlaces(run_dir).launch)


def read_token(run_dir: Path) -> str:
    """Read the driver's secret."""
    return RunPlaces(run_dir).report_token.read_text()


def _unpack(package: Path, target: Path) -> None:
    """Unpack so that the folder is whole or not there."""
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        unpack(package.read_bytes(), temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
