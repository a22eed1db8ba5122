"""Submission: a request is checked, then it becomes a durable job, exactly once."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from kfac_dist._home import runs_dir
from kfac_dist.config import JobSpec, parse_spec
from kfac_dist.config.urls import is_url, url_problem
from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import ConflictError, InvalidSpecError, UsageError
from kfac_dist.runs.transfer.package import check_package
from kfac_dist.service.job_records import Job, check_priority
from kfac_dist.service.store import JobRow, Store
from kfac_dist.service.store.job_rows import note, to_job

_KEY = re.compile(r"[\x21-\x7e]{1,200}")


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """A checked request; `package` is a zip of the folder with the user's code."""

    spec: JobSpec
    owner: str
    priority: int
    idempotency_key: str | None
    package: bytes | None
    data_dir: str | None

    @property
    def package_sha256(self) -> str | None:
        """The name under which the package is stored."""
        return None if self.package is None else hashlib.sha256(self.package).hexdigest()

    @property
    def sha256(self) -> str:
        """A hash of what is requested, without owner and key: equal for equal requests."""
        requested = [
            self.spec.model_dump(mode="json"),
            self.priority,
            self.package_sha256,
            self.data_dir,
        ]
        return hashlib.sha256(json.dumps(requested, sort_keys=True).encode()).hexdigest()


def check_request(
    spec: Mapping[str, Any],
    *,
    owner: str,
    priority: int,
    idempotency_key: str | None,
    package: bytes | None,
    data_dir: str | None,
) -> JobRequest:
    """Check everything that can be checked without running the user's code.

    Raises:
        InvalidSpecError: the specification or the package is wrong.
        UsageError: another part of the request is wrong.
    """
    check_priority(priority)
    if idempotency_key is not None and not _KEY.fullmatch(idempotency_key):
        raise UsageError(
            "idempotency_key: must be 1 to 200 printable ASCII characters without spaces"
        )
    if data_dir is not None and (problem := _data_problem(data_dir)) is not None:
        raise UsageError(f"data_dir: {problem}")
    resolved = parse_spec(spec)
    _check_task(resolved, package)
    return JobRequest(
        spec=resolved,
        owner=owner,
        priority=priority,
        idempotency_key=idempotency_key,
        package=package,
        data_dir=data_dir,
    )


def _data_problem(data_dir: str) -> str | None:
    if is_url(data_dir):
        return url_problem(data_dir)
    if "\x00" in data_dir or not Path(data_dir).is_absolute():
        return f"{data_dir!r} must be a URL, or an absolute path that every node has"
    return None


def _check_task(spec: JobSpec, package: bytes | None) -> None:
    """Refuse a task whose code is missing, superfluous or outside the package."""
    source = spec.task.rpartition(":")[0]
    if package is not None:
        if not source:
            raise InvalidSpecError(f"task: {spec.task} is built in, but user code came with it")
        check_package(package)
    if not source.endswith(".py"):
        return
    path = PurePosixPath(source)
    if path.is_absolute() or ".." in path.parts:
        raise InvalidSpecError(
            f"task: {source} must be a path inside the folder of the specification"
        )
    if package is None:
        raise InvalidSpecError(f"task: {source} is user code, but none came with the job")


def submit(store: Store, home: Path, request: JobRequest) -> tuple[Job, bool]:
    """Return the job of a request, and whether it is new.

    Raises:
        ConflictError: the idempotency key was used for another request.
    """
    if (job := _find_submitted(store, request)) is not None:
        return job, False
    _keep_package(home, request)
    try:
        return _insert(store, home, request), True
    except IntegrityError:  # another call used the same key since the first look
        if (job := _find_submitted(store, request)) is not None:
            return job, False
        raise


def package_path(home: Path, sha256: str) -> Path:
    """Return the file of a stored package."""
    return home / "packages" / f"{sha256}.zip"


def _find_submitted(store: Store, request: JobRequest) -> Job | None:
    """Return the job that this owner has already submitted with this key."""
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
    """Store the user's code, before there is a job that needs it."""
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
        run_dir=str(runs_dir(home) / job_id),
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
