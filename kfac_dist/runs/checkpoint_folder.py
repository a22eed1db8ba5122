"""The folder of checkpoints: their names, and writing one that a kill cannot leave half done.

    checkpoints/step-00000100/      the files that the caller gives, see workers/checkpoint.py

A checkpoint is written under a temporary name, made durable with fsync, and renamed. So it appears
whole or not at all, whenever the process or the machine dies.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# While a checkpoint is replaced by another of its step, the old one has this ending, and the place
# in the list that it had: at no moment is the step without a checkpoint.
_REPLACED = ".replaced"
_NAME = re.compile(rf"step-([0-9]{{8,}})({re.escape(_REPLACED)})?")
_TEMPORARY = ".tmp-"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint by its name; nothing in it has been verified."""

    step: int
    path: Path


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of a checkpoint."""
    return f"step-{step:08d}"


def checkpoint_step(name: str) -> int | None:
    """Return the step of the checkpoint whose folder has this name, None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and match[2] is None else None


def list_checkpoints(folder: Path) -> tuple[CheckpointInfo, ...]:
    """Return the checkpoints in `folder`, newest first; empty if the folder does not exist."""
    if not folder.is_dir():
        return ()
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    found = [(int(m[1]), m[2] is None, path) for m, path in matches if m and path.is_dir()]
    found.sort(reverse=True)
    return tuple(CheckpointInfo(step=step, path=path) for step, _, path in found)


def write_folder(folder: Path, step: int, files: Mapping[str, bytes], keep: int) -> Path:
    """Write `files` as the checkpoint of `step`, durably, prune, and return its folder.

    A checkpoint of the same step is replaced. The `keep` newest ones up to this step stay. Those of
    later steps are removed: they belong to an attempt that was given up.

    Raises:
        OSError: the file system refused; no checkpoint is lost.
    """
    if not folder.is_dir():
        # Not its parents: a run folder that was removed must not come back as a stump.
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)
    _remove_temporary(folder)
    final = folder / checkpoint_name(step)
    temporary = folder / f"{_TEMPORARY}{final.name}"
    try:
        _write_files(temporary, files)
        _put_in_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _prune(folder, final, keep)
    return final


def _remove_temporary(folder: Path) -> None:
    """Remove what a kill left half written or half removed."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir()
    for name, content in files.items():
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    _sync(folder)


def _put_in_place(temporary: Path, final: Path) -> None:
    if final.exists():
        aside = final.with_name(f"{final.name}{_REPLACED}")
        _remove(aside)
        final.rename(aside)
    temporary.rename(final)
    _sync(final.parent)


def _prune(folder: Path, newest: Path, keep: int) -> None:
    paths = [info.path for info in list_checkpoints(folder)]
    position = paths.index(newest)
    kept = [path for path in paths[position:] if not path.name.endswith(_REPLACED)][:keep]
    for path in paths:
        if path not in kept:
            _remove(path)
    _sync(folder)


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill never leaves half of it under its own name."""
    if path.exists():
        doomed = path.with_name(f"{_TEMPORARY}removed-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def _sync(folder: Path) -> None:
    """Make the names in a folder durable, as fsync does for the bytes of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
