"""A request for a job: checked, resolved, and told apart from other requests."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kfac_dist.config import JobSpec, parse_spec
from kfac_dist.errors import InvalidSpecError, UsageError
from kfac_dist.service.package import check_package

MAX_PRIORITY = 1000
_KEY = re.compile(r"[\x21-\x7e]{1,200}")


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """A checked request; `package` is a zip of the folder in which user code is looked for."""

    spec: JobSpec
    owner: str
    priority: int
    idempotency_key: str | None
    package: bytes | None
    data_dir: str | None

    @property
    def package_sha256(self) -> str | None:
        """What the package is stored under."""
        return None if self.package is None else hashlib.sha256(self.package).hexdigest()

    @property
    def sha256(self) -> str:
        """The same for the same request, whatever its key."""
        asked = [
            self.spec.model_dump(mode="json"),
            self.priority,
            self.package_sha256,
            self.data_dir,
        ]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


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
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise UsageError(f"priority: {priority} is not between {-MAX_PRIORITY} and {MAX_PRIORITY}")
    if idempotency_key is not None and not _KEY.fullmatch(idempotency_key):
        raise UsageError(
            "idempotency_key: must be 1 to 200 printable ASCII characters without spaces"
        )
    if data_dir is not None and ("\x00" in data_dir or not Path(data_dir).is_absolute()):
        raise UsageError(
            f"data_dir: {data_dir!r} must be an absolute path on the cluster's file system"
        )
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


def _check_task(spec: JobSpec, package: bytes | None) -> None:
    source = spec.task.rpartition(":")[0]
    if package is not None:
        if not source:
            raise InvalidSpecError(f"task: {spec.task} is built in, and user code came with it")
        check_package(package)
    if not source.endswith(".py"):
        return
    path = PurePosixPath(source)
    if path.is_absolute() or ".." in path.parts:
        raise InvalidSpecError(
            f"task: {source} must be a path inside the folder of the specification"
        )
    if package is None:
        raise InvalidSpecError(f"task: {source} is user code, and none came with the job")
