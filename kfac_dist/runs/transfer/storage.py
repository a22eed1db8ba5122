"""Mirrors a run folder to a storage while the job runs, in a thread that no step waits for.

The thread looks at the folder every few seconds. A new checkpoint is linked aside, so that pruning
cannot take it away, then go the records, the files of the checkpoint, and its seal. So what is in
the storage always has the records of the steps before its newest whole checkpoint.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from kfac_dist.errors import KfacDistError
from kfac_dist.runs.checkpoint_folder import checkpoint_name, list_checkpoints
from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.runs.transfer.remote import RemoteFolder
from kfac_dist.runs.transfer.restore import MANIFEST, SEAL, stored_job

_PAUSE_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 60.0
# Records grow and are uploaded whole each time, so uploads may take a tenth of the time.
_PAUSE_RATIO = 9
_PATIENCE_SECONDS = 20.0  # at the end of a job, for a storage that takes nothing
_STAGED = ".storing"

_Signature = tuple[int, int, int]


class Say(Protocol):
    """Receives what users should know, from the thread."""

    def __call__(self, kind: str, message: str) -> None:
        """Record a warning; `kind` is a machine word."""


class StorageMirror:
    """Uploads what changes in a run folder; `start` and `finish` are called once each."""

    def __init__(
        self,
        places: RunPlaces,
        storage: RemoteFolder,
        attempt: int,
        say: Say,
        *,
        is_unreachable: bool = False,
    ) -> None:
        """Store what to mirror; `is_unreachable` says that the user knows it already."""
        self._places = places
        self._storage = storage
        self._attempt = attempt
        self._say = say
        self._stored: dict[str, _Signature] = {}
        self._stored_steps: set[int] = set()
        self._is_unreachable = is_unreachable
        self._is_replaced = False
        self._last_success = 0.0
        self._woken = threading.Condition()
        self._ends_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="storage", daemon=True)

    def start(self) -> None:
        """Mirror from now on."""
        self._thread.start()

    def finish(self, seconds: float) -> list[str]:
        """Upload the rest for at most `seconds`, and return the names of what is not up then.

        A storage that takes nothing for 20 s is given up.
        """
        with self._woken:
            self._last_success = time.monotonic()
            self._ends_at = self._last_success + seconds
            self._woken.notify()
        self._thread.join(seconds)
        shutil.rmtree(self._staged, ignore_errors=True)
        return list(self._missing())

    @property
    def _staged(self) -> Path:
        return self._places.folder / _STAGED

    def _run(self) -> None:
        pause, is_done = _PAUSE_SECONDS, True
        while not self._is_replaced:
            self._wait(pause, retries=not is_done)
            is_last = self._ends_at is not None  # read first: what is written later may be left
            started = time.monotonic()
            is_done = self._try_to_store()
            seconds = time.monotonic() - started
            if is_last and (is_done or self._gives_up()):
                return
            if is_done:
                pause = max(_PAUSE_SECONDS, _PAUSE_RATIO * seconds)
            else:
                pause = min(_LONGEST_PAUSE_SECONDS, 2 * pause)

    def _gives_up(self) -> bool:
        now = time.monotonic()
        return now > (self._ends_at or 0.0) or now - self._last_success > _PATIENCE_SECONDS

    def _wait(self, seconds: float, *, retries: bool) -> None:
        with self._woken:
            if self._ends_at is None:
                self._woken.wait(seconds)
                return
        if retries:
            time.sleep(min(_PAUSE_SECONDS, max(0.0, self._ends_at - time.monotonic())))

    def _try_to_store(self) -> bool:
        """Upload what is new; return whether all is up. Says once that there is trouble."""
        try:
            self._store()
        except FileNotFoundError:  # replaced or pruned meanwhile; the next look sees what is there
            return False
        except (KfacDistError, OSError) as error:
            if not self._is_unreachable:
                self._is_unreachable = True
                problem = error.message if isinstance(error, KfacDistError) else str(error)
                self._say("storage_unreachable", f"{problem}; it is tried again until the job ends")
            return False
        if self._is_unreachable:
            self._is_unreachable = False
            self._say("storage_reached", f"{self._storage.url}: reached again; all is up")
        return True

    def _store(self) -> None:
        if self._has_successor():
            return
        step = self._stage_checkpoint()
        for name in self._changed_records():
            self._put(self._places.folder / name, name)
        if step is not None:
            self._store_checkpoint(step)

    def _has_successor(self) -> bool:
        """Return whether a newer attempt writes to the storage, which ends this mirror."""
        job = stored_job(self._storage)
        if job is None or job.attempt <= self._attempt:
            return False
        self._is_replaced = True
        self._say(
            "storage_taken_over",
            f"{self._storage.url}: attempt {job.attempt} of the job writes there now, so attempt "
            f"{self._attempt} no longer does",
        )
        return True

    def _put(self, path: Path, name: str) -> None:
        signature = _signature(path)  # before: what is written meanwhile is uploaded again
        self._upload(path, name)
        self._stored[name] = signature

    def _upload(self, path: Path, name: str) -> None:
        self._storage.put(path, name)
        self._last_success = time.monotonic()

    def _changed_records(self) -> Iterator[str]:
        for name in self._records():
            if self._stored.get(name) != _signature(self._places.folder / name):
                yield name

    def _records(self) -> list[str]:
        """Return the names of all records there are; the last says that there is a run."""
        places = self._places
        paths = [places.spec, places.metrics, places.events, places.summary, places.report]
        logs = [
            path
            for path in sorted(places.logs.glob("*"))
            if (log := places.parse_log_name(path.name)) and log.attempt == self._attempt
        ]
        found = [path for path in (*paths, *logs, places.job) if path.exists()]
        return [path.relative_to(places.folder).as_posix() for path in found]

    def _stage_checkpoint(self) -> int | None:
        """Link the newest checkpoint aside if it is not up; return its step."""
        newest = next(iter(list_checkpoints(self._places.checkpoints)), None)
        if newest is None or newest.step in self._stored_steps:
            return None
        shutil.rmtree(self._staged, ignore_errors=True)
        shutil.copytree(newest.path, self._staged, copy_function=_link)
        return newest.step

    def _store_checkpoint(self, step: int) -> None:
        folder = f"{self._places.checkpoints.name}/{checkpoint_name(step)}"
        # A checkpoint of this step from an attempt that was given up must not lend its seal.
        self._storage.remove(folder)
        names = [path.name for path in self._staged.iterdir() if path.name not in (MANIFEST, SEAL)]
        for name in (*sorted(names), MANIFEST, SEAL):
            self._upload(self._staged / name, f"{folder}/{name}")
        self._stored_steps.add(step)
        shutil.rmtree(self._staged, ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        """Remove the checkpoints that this machine has no more, each beginning with its seal."""
        prefix = f"{self._places.checkpoints.name}/"
        kept = {checkpoint_name(info.step) for info in list_checkpoints(self._places.checkpoints)}
        kept |= {checkpoint_name(max(self._stored_steps))}
        stored = {name.split("/")[1] for name in self._storage.files() if name.startswith(prefix)}
        for folder in stored - kept:
            self._storage.remove(f"{prefix}{folder}/{SEAL}")
            self._storage.remove(f"{prefix}{folder}")

    def _missing(self) -> Iterator[str]:
        """Yield what is not up, or not in its newest state."""
        yield from self._changed_records()
        newest = next(iter(list_checkpoints(self._places.checkpoints)), None)
        if newest is not None and newest.step not in self._stored_steps:
            yield f"{self._places.checkpoints.name}/{newest.path.name}"


def _signature(path: Path) -> _Signature:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _link(source: str, target: str) -> None:
    """Link a file, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
