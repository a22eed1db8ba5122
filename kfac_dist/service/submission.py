"""A checked request becomes a durable job, once."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import ConflictError
from kfac_dist.service.job_rows import note, to_job
from kfac_dist.service.records import Job
from kfac_dist.service.requests import JobRequest
from kfac_dist.service.store import JobRow, Store


def submit(store: Store, home: Path, request: JobRequest) -> tuple[Job, bool]:
    """Return the job of a request, and whether it is a new one.

    Raises:
        ConflictError: its key was used for another request.
    """
    if (job := _same(store, request)) is not None:
        return job, False
    _keep_package(home, request)
    try:
        return _insert(store, home, request), True
    except IntegrityError:  # the same key at the same time
        if (job := _same(store, request)) is not None:
            return job, False
        raise


def package_path(home: Path, sha256: str) -> Path:
    """Where a package is kept."""
    return home / "packages" / f"{sha256}.zip"


def _same(store: Store, request: JobRequest) -> Job | None:
    """Return the job that the owner's key has made before."""
    if request.idempotency_key is None:
        return None
    with store.read() as session:
        row = session.scalar(
            select(JobRow).where(
                JobRow.owner == request.owner,
                JobRow.idempotency_key == request.idempotency_key,
            )
        )
    if row is None:
        return None
    if row.request_sha256 != request.sha256:
        raise ConflictError(
            f"idempotency_key: {request.idempotency_key} was used for another request, which "
            f"became job {row.id}; use a new key"
        )
    return to_job(row)


def _keep_package(home: Path, request: JobRequest) -> None:
    """Keep the user's code, before there is a job that needs it."""
    if request.package is None or request.package_sha256 is None:
        return
    path = package_path(home, request.package_sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(request.package)
    temporary.replace(path)


def _insert(store: Store, home: Path, request: JobRequest) -> Job:
    now = time.time()
    job_id = f"{request.spec.name}-{secrets.token_hex(4)}"
    row = JobRow(
        id=job_id,
        name=request.spec.name,
        owner=request.owner,
        idempotency_key=request.idempotency_key,
        request_sha256=request.sha256,
        state=JobState.PENDING,
        state_since=now,
        priority=request.priority,
        spec=request.spec.model_dump(mode="json"),
        num_steps=request.spec.steps,
        created_at=now,
        updated_at=now,
        run_dir=str(home / "runs" / job_id),
        data_dir=request.data_dir,
        package=request.package_sha256,
        attempt=0,
        num_restarts=0,
        cancel_now=False,
        revision=0,
        last_sequence=0,
        events_known=0,
        steps_known=0,
    )
    with store.write() as session:
        session.add(row)
        session.flush()
        note(session, row, "submitted", f"submitted by {request.owner}", now)
    return to_job(row)
