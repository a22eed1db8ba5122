"""A run folder from a storage: its records, and its newest checkpoint that is whole.

In the storage a run is a folder named after its job, laid out as the run folder is. A checkpoint
without its seal is still being uploaded, or was torn; it does not count.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from kfac_dist.errors import ConflictError, NotFoundError, UnreachableError
from kfac_dist.runs.checkpoint_folder import checkpoint_step
from kfac_dist.runs.parsing import parse_record
from kfac_dist.runs.records import JobRecord
from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.runs.transfer.remote import RemoteFolder

# As in workers/checkpoint.py, which writes and reads them.
MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
_TEMPORARY = ".restoring"
# Taken from a storage in this order: a folder with the last of them holds a run.
_RECORDS = ("spec.yaml", "metrics.jsonl", "events.jsonl")
_JOB = "job.json"


def stored_job(storage: RemoteFolder) -> JobRecord | None:
    """Return the state of the run in a storage, None if it has none.

    Raises:
        KfacDistError: the storage does not answer, or the record is damaged.
    """
    content = storage.read(_JOB)
    if content is None:
        return None
    try:
        values = json.loads(content)
    except ValueError as error:
        raise UnreachableError(f"{storage.url}/{_JOB} is damaged: {error}") from error
    return parse_record(JobRecord, values, Path(_JOB))


def refuse_stored(storage: RemoteFolder) -> None:
    """Refuse to start a run whose place in the storage holds another.

    Raises:
        ConflictError: it does.
    """
    if (job := stored_job(storage)) is not None:
        raise ConflictError(
            f"{storage.url}: this folder of the storage holds the run of job {job.job} "
            f"({job.state}, step {job.step}). Continue it with --resume, or choose another name "
            "or storage"
        )


def restore_run(storage: RemoteFolder, run_dir: Path) -> tuple[str, ...] | None:
    """Fetch the run in `storage` into `run_dir`, which holds no run; None if the storage has none.

    The logs of earlier attempts stay where they are. Returns a message for each newer checkpoint
    that is damaged.

    Raises:
        NotFoundError: the storage has checkpoints, and all are damaged.
        UnreachableError: the storage does not answer.
    """
    if stored_job(storage) is None:
        return None
    places = RunPlaces(run_dir)
    temporary = run_dir / _TEMPORARY
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        names = set(storage.files())
        refused = _fetch_checkpoint(storage, names, temporary, places.checkpoints)
        places.logs.mkdir(exist_ok=True)
        for name in (*_RECORDS, _JOB):
            if name in names:
                storage.get(name, temporary / name)
                (temporary / name).replace(run_dir / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return refused


def _fetch_checkpoint(
    storage: RemoteFolder, names: Iterable[str], temporary: Path, checkpoints: Path
) -> tuple[str, ...]:
    """Put the newest whole checkpoint in place; the messages are about newer ones."""
    checkpoints.mkdir(exist_ok=True)
    sealed = {parts[1] for name in names if (parts := name.split("/"))[-1] == SEAL and parts[1:]}
    refused: list[str] = []
    for folder in sorted(sealed, key=lambda name: checkpoint_step(name) or 0, reverse=True):
        if checkpoint_step(folder) is None:
            continue
        target = temporary / folder
        problem = _fetch_whole(storage.below(f"{checkpoints.name}/{folder}"), target)
        if problem is None:
            final = checkpoints / folder
            shutil.rmtree(final, ignore_errors=True)  # left by a restoration that was killed
            target.rename(final)
            return tuple(refused)
        refused.append(f"checkpoint {folder} in {storage.url} refused: {problem}")
    if refused:
        raise NotFoundError(f"no whole checkpoint in {storage.url}: {'; '.join(refused)}")
    return ()


def _fetch_whole(storage: RemoteFolder, target: Path) -> str | None:
    """Fetch a checkpoint, and return what is wrong with it."""
    target.mkdir()
    try:
        for name in (SEAL, MANIFEST):
            storage.get(name, target / name)
        if (problem := _differs(target / MANIFEST, _hash_in_seal(target / SEAL))) is not None:
            return problem
        for name, entry in json.loads((target / MANIFEST).read_bytes())["files"].items():
            storage.get(name, target / name)
            if (problem := _differs(target / name, entry["sha256"])) is not None:
                return problem
    except NotFoundError as error:
        return error.message
    return None


def _hash_in_seal(seal: Path) -> str:
    return seal.read_text(errors="replace").partition(" ")[0]


def _differs(path: Path, sha256: str) -> str | None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == sha256 else f"{path.name} has another sha256 than was recorded"
