"""Checkpoints on disk: written as a whole or not at all, and verified before they are used.

    checkpoints/step-00000100/
        <role>.safetensors      the arrays of one role
        manifest.json           format, step, sha256 and size of each file above, state
        manifest.sha256         the sha256 of manifest.json, in the format of `sha256sum -c`

Pickle is never read or written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from kfac_dist.errors import InvalidSpecError, JobFailedError, NotFoundError
from kfac_dist.runs.checkpoint_folder import CheckpointInfo, list_checkpoints, write_folder
from workers.exchange.arrays import Array, Arrays

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_SEAL = "manifest.sha256"
_SUFFIX = ".safetensors"
_ROLE_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A verified checkpoint.

    `roles` maps a role to its arrays by name; they are writable copies. `state` is what was given
    to `write_checkpoint`, after a round trip through JSON: tuples become lists, keys strings.
    `refused` has a message for each newer checkpoint that was torn or altered.
    """

    step: int
    roles: dict[str, dict[str, Array]]
    state: dict[str, Any]
    path: Path
    refused: tuple[str, ...]


class _RefusedError(Exception):
    """A checkpoint differs from what was written; the text says how."""


def write_checkpoint(
    folder: Path,
    step: int,
    roles: Mapping[str, Arrays],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint of `step` and return its folder; it is on disk when this returns.

    A checkpoint of the same step is replaced. Checkpoints of later steps come from an attempt that
    was given up, and are removed, as are the half-written files of an earlier crash.

    Args:
        folder: holds all checkpoints of the run.
        step: the step that has just been done.
        roles: the arrays of each role, by name.
        state: everything else, as JSON can hold it.
        keep: how many of the newest checkpoints stay.

    Raises:
        InvalidSpecError: step or keep is out of range, or a role's name is not a file name.
        TypeError, ValueError: the state cannot be written as JSON, which has no NaN or Inf.
        JobFailedError: writing failed, for example on a full disk; no checkpoint was lost.
    """
    _check_arguments(step, roles, keep)
    files = {f"{role}{_SUFFIX}": _to_bytes(arrays) for role, arrays in roles.items()}
    files |= _manifest_files(step, files, state)
    try:
        return write_folder(folder, step, files, keep)
    except OSError as error:
        raise JobFailedError(
            f"the checkpoint of step {step} cannot be written to {folder}: {error}",
            reason="checkpoint_not_written",
        ) from error


def _check_arguments(step: int, roles: Mapping[str, Arrays], keep: int) -> None:
    if step < 0:
        raise InvalidSpecError(f"the step of a checkpoint must be at least 0; got {step}")
    if keep < 1:
        raise InvalidSpecError(f"checkpoint.keep must be at least 1; got {keep}")
    for role in roles:
        if not _ROLE_NAME.fullmatch(role):
            raise InvalidSpecError(
                f"the name of a role may have letters, digits, '-' and '_'; got {role!r}"
            )


def _to_bytes(arrays: Arrays) -> bytes:
    # Not np.ascontiguousarray, which turns a scalar into a vector.
    return save_arrays({name: np.asarray(array, order="C") for name, array in arrays.items()})


def _manifest_files(
    step: int, files: Mapping[str, bytes], state: Mapping[str, Any]
) -> dict[str, bytes]:
    manifest = {
        "format": FORMAT_VERSION,
        "step": step,
        "files": {
            name: {"sha256": _sha256(content), "bytes": len(content)}
            for name, content in files.items()
        },
        "state": state,
    }
    text = (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()
    return {_MANIFEST: text, _SEAL: _seal(text)}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _seal(manifest: bytes) -> bytes:
    return f"{_sha256(manifest)}  {_MANIFEST}\n".encode()


def load_newest(
    folder: Path,
    steps: Container[int] | None = None,
    lacks: Callable[[LoadedCheckpoint], str | None] = lambda _: None,
) -> LoadedCheckpoint | None:
    """Return the newest whole checkpoint in `folder`, None if the folder has no checkpoint.

    With `steps`, only checkpoints of these steps count. The size and hash of every file are
    compared with the manifest before anything in it is used. `lacks` returns what the caller needs
    and a checkpoint does not have; such a checkpoint is refused, too.

    Raises:
        NotFoundError: no checkpoint is whole; the message gives the reason for each.
    """
    refused: list[str] = []
    for info in list_checkpoints(folder):
        if steps is not None and info.step not in steps:
            continue
        try:
            loaded = _load(info, tuple(refused))
            if (missing := lacks(loaded)) is not None:
                raise _RefusedError(f"{_MANIFEST} has no {missing}")
            return loaded
        except (_RefusedError, OSError) as error:
            refused.append(f"checkpoint {info.path.name} refused: {error}")
    if refused:
        raise NotFoundError(f"no whole checkpoint in {folder}: {'; '.join(refused)}")
    return None


def _load(info: CheckpointInfo, refused: tuple[str, ...]) -> LoadedCheckpoint:
    manifest = _read_manifest(info)
    try:
        roles = {_role(n): _read_arrays(info.path / n, e) for n, e in manifest["files"].items()}
        state = dict(manifest["state"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _RefusedError(f"{_MANIFEST} is not laid out as format {FORMAT_VERSION}") from error
    return LoadedCheckpoint(
        step=info.step, roles=roles, state=state, path=info.path, refused=refused
    )


def _read_manifest(info: CheckpointInfo) -> dict[str, Any]:
    text = _read(info.path / _MANIFEST)
    if _read(info.path / _SEAL) != _seal(text):
        raise _RefusedError(f"{_MANIFEST} has another sha256 than {_SEAL} says")
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise _RefusedError(f"{_MANIFEST} is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise _RefusedError(f"{_MANIFEST} is not a JSON object")
    version, step = manifest.get("format"), manifest.get("step")
    if version != FORMAT_VERSION:
        raise _RefusedError(f"its format is {version!r}; this version reads {FORMAT_VERSION}")
    if step != info.step:
        raise _RefusedError(f"{_MANIFEST} says step {step!r}")
    return manifest


def _role(file_name: str) -> str:
    role = file_name.removesuffix(_SUFFIX)
    if role == file_name or not _ROLE_NAME.fullmatch(role):
        raise _RefusedError(f"{_MANIFEST} lists {file_name!r}, which is not the file of a role")
    return role


def _read_arrays(path: Path, entry: Mapping[str, Any]) -> dict[str, Array]:
    content = _read(path)
    if len(content) != entry["bytes"]:
        raise _RefusedError(f"{path.name} has {len(content)} bytes, not {entry['bytes']}")
    if _sha256(content) != entry["sha256"]:
        raise _RefusedError(f"{path.name} has another sha256 than {_MANIFEST} says")
    try:
        arrays: dict[str, Array] = load_arrays(content)
    except SafetensorError as error:
        raise _RefusedError(f"{path.name} cannot be read: {error}") from error
    return {name: np.require(array, requirements="W") for name, array in arrays.items()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise _RefusedError(f"{path.name} is missing") from error
