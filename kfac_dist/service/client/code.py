"""The user's code that is sent along with a job."""

from __future__ import annotations

from pathlib import Path

from kfac_dist.config import JobSpec
from kfac_dist.errors import InvalidSpecError
from kfac_dist.service.wire.package import pack


def package_of(spec: JobSpec, base_dir: Path | None) -> bytes | None:
    """Return the folder `base_dir` as a package if the job's task is in it, else None.

    A task in a module that is not in the folder is assumed to be installed on the cluster.

    Raises:
        InvalidSpecError: the task's file is not in the folder, or the folder is too large.
    """
    source, _, _ = spec.task.rpartition(":")
    if not source:
        return None
    if not source.endswith(".py"):
        top = source.partition(".")[0]
        is_here = base_dir is not None and (
            (base_dir / top).is_dir() or (base_dir / f"{top}.py").is_file()
        )
        return pack(base_dir) if is_here and base_dir is not None else None
    if base_dir is None:
        raise InvalidSpecError(f"task: {spec.task} is a file; give its folder as base_dir")
    inside = (base_dir / source).resolve()
    if not inside.is_file():
        raise InvalidSpecError(f"task: the file {inside} does not exist (task {spec.task})")
    if not inside.is_relative_to(base_dir.resolve()):
        raise InvalidSpecError(
            f"task: {source} is outside of {base_dir}, the folder that is sent to the cluster; "
            "move the file into it"
        )
    return pack(base_dir)
