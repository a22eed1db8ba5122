"""The user's code that is sent along with a job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kfac_dist.config import JobSpec
from kfac_dist.errors import InvalidSpecError
from kfac_dist.runs.transfer.package import pack
from kfac_dist.runs.transfer.package_contents import Contents, contents_of


@dataclass(frozen=True, kw_only=True)
class UserCode:
    """The folder that is sent along with a job, and which of its files are sent."""

    folder: Path
    contents: Contents

    def pack(self) -> bytes:
        """Return the package; InvalidSpecError if it is too large or a file cannot be read."""
        return pack(self.folder, self.contents)


def package_of(spec: JobSpec, base_dir: Path | None) -> bytes | None:
    """Return the folder `base_dir` as a package if the job's task is in it, else None.

    Raises:
        InvalidSpecError: as for `code_of`, or the folder is too large.
    """
    code = code_of(spec, base_dir)
    return None if code is None else code.pack()


def code_of(spec: JobSpec, base_dir: Path | None) -> UserCode | None:
    """Return the code that the job needs: `base_dir` if its task is in it, else None.

    A task in a module that is not in the folder is assumed to be installed on the cluster.

    Raises:
        InvalidSpecError: the task's file is not in the folder, or would not be sent.
    """
    source, _, _ = spec.task.rpartition(":")
    if not source:
        return None
    if source.endswith(".py"):
        base_dir, name = _folder_of_file(spec, source, base_dir)
    else:
        found = _module_file(source.partition(".")[0], base_dir)
        if found is None or base_dir is None:
            return None
        name = found
    contents = contents_of(base_dir)
    _check_sent(spec, name, contents)
    return UserCode(folder=base_dir, contents=contents)


def _folder_of_file(spec: JobSpec, source: str, base_dir: Path | None) -> tuple[Path, str]:
    """Return the folder to send and the name of the task's file in it."""
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
    if Path(source).is_absolute() or ".." in Path(source).parts:
        raise InvalidSpecError(
            f"task: {source} is a path of this machine only; name the file relative to {base_dir}: "
            f"{inside.relative_to(base_dir.resolve())}"
        )
    return base_dir, Path(source).as_posix()


def _module_file(top: str, base_dir: Path | None) -> str | None:
    """Return the file or folder of a module that is in `base_dir`, None if it is not there."""
    if base_dir is None:
        return None
    if (base_dir / top).is_dir():
        return f"{top}/"
    return f"{top}.py" if (base_dir / f"{top}.py").is_file() else None


def _check_sent(spec: JobSpec, name: str, contents: Contents) -> None:
    """Check that the task's file, or a file of its package, is sent."""
    for entry in contents.left_out:
        folder = f"{entry.name.rstrip('/')}/"
        if entry.name == name or name.startswith(folder):
            raise InvalidSpecError(
                f"task: {name} would not be sent to the cluster ({entry.name}: {entry.why}), and "
                f"task {spec.task} needs it"
            )
