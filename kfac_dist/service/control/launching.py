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
from kfac_dist.runs.writing import write_secret, write_whole
from kfac_dist.service.job_records import Job
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.store import AttemptRow, JobRow
from kfac_dist.service.store.job_rows import move, note
from kfac_dist.service.submission import package_path
from kfac_dist.service.wire.package import unpack

_LAUNCH, _TOKEN, _CODE = "launch.json", "report.token", "code"


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
    if job.package is not None and not (folder / _CODE).exists():
        _unpack(package_path(jobs.home, job.package), folder / _CODE)
    launch = Launch(
        job=job.id,
        attempt=job.attempt,
        resume=has_run(folder),
        spec=dict(job.spec),
        home=jobs.home,
        data_dir=Path(job.data_dir) if job.data_dir else None,
    )
    write_secret(folder / _TOKEN, token)
    write_whole(folder / _LAUNCH, launch.model_dump_json(indent=2) + "\n")


def has_run(folder: Path) -> bool:
    """Whether there is a run to go on with."""
    return (folder / "job.json").exists()


def read_launch(run_dir: Path) -> Launch:
    """Read what the driver is to run."""
    return read_whole(Launch, run_dir / _LAUNCH)


def read_token(run_dir: Path) -> str:
    """Read the driver's secret."""
    return (run_dir / _TOKEN).read_text()


def code_dir(run_dir: Path) -> Path:
    """Where the user's code is looked for."""
    return run_dir / _CODE


def _unpack(package: Path, target: Path) -> None:
    """Unpack so that the folder is whole or not there."""
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        unpack(package.read_bytes(), temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
