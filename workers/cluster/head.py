"""The embedded cluster of a control plane, kept by a process of its own.

Jobs outlive a server that is killed, so the cluster must. The keeper holds the lock of
`$KFAC_DIST_HOME/ray` as long as it lives, and writes `head.json` when the cluster is there; it
ends at SIGTERM, and its guard cleans up when it is killed.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from kfac_dist.errors import ConflictError, UnreachableError
from kfac_dist.runs.lock import FolderLock, holder_of
from kfac_dist.runs.writing import write_secret, write_whole

_FILE, _LOG, _TOKEN = "head.json", "head.log", "token"
_START_SECONDS = 120.0
# A raylet gives up when its own agents need more than 15 s, as they may on a busy machine.
_MOST_STARTS = 2
_END_SECONDS = 60.0
_LOCK_SECONDS = 2.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Head:
    """A cluster that lives: where drivers and the Jobs API are, and its keeper's process.

    Whoever can read the secret in the file `token_path` may run code on it.
    """

    gcs_address: str
    jobs_url: str
    token_path: str
    pid: int


def ensure_head(home: Path) -> Head:
    """Return the cluster of this home, which is started unless it lives.

    Raises:
        UnreachableError: it does not start; the message has the end of its log.
    """
    folder = _folder(home)
    folder.mkdir(parents=True, exist_ok=True)
    if (head := read_head(home)) is not None:
        return head
    for _ in range(_MOST_STARTS):
        if (head := _start_keeper(home)) is not None:
            return head
    tail = (folder / _LOG).read_text(errors="replace").strip().splitlines()[-5:]
    raise UnreachableError("the embedded Ray cluster does not start: " + " | ".join(tail))


def _start_keeper(home: Path) -> Head | None:
    """Start a keeper and wait for its cluster, or another's that was faster; None when it ended."""
    with (_folder(home) / _LOG).open("wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "workers.cluster.head", str(home)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # neither Ctrl-C nor the server's end is for it
        )
    # Takes note of its end, should it come before the end of this process.
    threading.Thread(target=keeper.wait, name="keeper", daemon=True).start()
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        ended = keeper.poll() is not None  # before looking: another may have been faster
        if (head := read_head(home)) is not None:
            return head
        if ended:
            return None
        time.sleep(_POLL_SECONDS)
    keeper.terminate()
    return None


def read_head(home: Path) -> Head | None:
    """Return the cluster of this home if it lives."""
    folder = _folder(home)
    if not (folder / _FILE).exists() or not _is_kept(folder):
        return None
    try:
        head = Head(**json.loads((folder / _FILE).read_text()))
    except FileNotFoundError:  # it ended meanwhile
        return None
    # Another keeper may be on its way, and the file be of one that was killed.
    return head if holder_of(folder) == head.pid else None


def end_head(home: Path) -> bool:
    """End the cluster of this home with all that runs on it; returns whether there was one.

    Raises:
        UnreachableError: it does not end.
    """
    head = read_head(home)
    if head is None:
        return False
    os.kill(head.pid, signal.SIGTERM)
    deadline = time.monotonic() + _END_SECONDS
    while _is_kept(_folder(home)):
        if time.monotonic() > deadline:
            raise UnreachableError(
                f"the keeper of the Ray cluster (pid {head.pid}) did not end within "
                f"{_END_SECONDS:g} s of SIGTERM; kill it, and its guard cleans up"
            )
        time.sleep(_POLL_SECONDS)
    return True


def _folder(home: Path) -> Path:
    return home / "ray"


def _is_kept(folder: Path) -> bool:
    """Whether a keeper lives: the operating system drops a lock with its holder."""
    try:
        FolderLock(folder).release()
    except ConflictError:
        return True
    return False


def keep(home: Path) -> None:
    """Start the cluster and keep it until SIGTERM.

    Raises:
        ConflictError: another keeper lives.
        UnreachableError: Ray does not start here.
    """
    from workers.cluster.cluster import head_cluster

    folder = _folder(home)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: ending.set())
    lock = _take_lock(folder)
    (folder / _FILE).unlink(missing_ok=True)
    try:
        token = write_secret(folder / _TOKEN, secrets.token_hex(32))
        with head_cluster(token) as addresses:
            head = Head(
                gcs_address=addresses.gcs,
                jobs_url=addresses.jobs_url,
                token_path=str(token),
                pid=os.getpid(),
            )
            write_whole(folder / _FILE, json.dumps(asdict(head)) + "\n")
            ending.wait()
            (folder / _FILE).unlink(missing_ok=True)
    finally:
        lock.release()


def _take_lock(folder: Path) -> FolderLock:
    """Take the keeper's lock; whoever only looks if it is free holds it for a moment."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return FolderLock(folder)
        except ConflictError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
