"""The embedded cluster of a control plane, kept alive by a separate process, the *keeper*.

Jobs must survive when the server is killed, so the cluster must too. The keeper holds the lock of
the folder `$KFAC_DIST_HOME/ray` while it lives, and writes `head.json` there once the cluster is
up. It ends at SIGTERM, and when one of Ray's daemons dies; if it is killed, its guard cleans up.
A cluster that a user ends by `kfac-dist cluster down` leaves a mark, so that no server starts it
again by itself.
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

_FILE, _LOG, _TOKEN, _ENDED = "head.json", "head.log", "token", "ended"
_START_SECONDS = 120.0
# On a busy machine a raylet's agents may need more than 15 s to start; then the raylet gives up.
_MOST_STARTS = 2
_END_SECONDS = 60.0
_LOCK_SECONDS = 2.0
_POLL_SECONDS = 0.1
_WATCH_SECONDS = 1.0  # between two looks at Ray's daemons
_DAEMON_DIED = 1


@dataclass(frozen=True, kw_only=True)
class Head:
    """A living cluster: its addresses for drivers and the Jobs API, and its keeper's process id.

    A user who can read the secret in the file `token_path` can run code on the cluster.
    """

    gcs_address: str
    jobs_url: str
    token_path: str
    pid: int


def ensure_head(home: Path) -> Head:
    """Return the cluster of this home; start it if it does not live.

    Raises:
        UnreachableError: the cluster does not start; the message has the end of its log.
    """
    folder = _folder(home)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _ENDED).unlink(missing_ok=True)
    if (head := read_head(home)) is not None:
        return head
    for _ in range(_MOST_STARTS):
        if (head := _start_keeper(home)) is not None:
            return head
    tail = (folder / _LOG).read_text(errors="replace").strip().splitlines()[-5:]
    raise UnreachableError("the embedded Ray cluster does not start: " + " | ".join(tail))


def _start_keeper(home: Path) -> Head | None:
    """Start a keeper and wait for the cluster; return None if the keeper ended without one.

    If another process starts a keeper at the same time, only one of them gets the lock. The cluster
    may then be the other one's.
    """
    with (_folder(home) / _LOG).open("wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-P", "-m", "workers.cluster.head", str(home)],
            cwd=_folder(home),  # Ray's processes import from their working folder
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C and the end of the server must not end it
        )
    # Reaps the keeper if it ends before this process does.
    threading.Thread(target=keeper.wait, name="keeper", daemon=True).start()
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        # Polled before the file is read: if this keeper ended because another one holds the lock,
        # the other's file may appear only now.
        ended = keeper.poll() is not None
        if (head := read_head(home)) is not None:
            return head
        if ended:
            return None
        time.sleep(_POLL_SECONDS)
    keeper.terminate()
    return None


def read_head(home: Path) -> Head | None:
    """Return the cluster of this home, None if it does not live."""
    folder = _folder(home)
    if not (folder / _FILE).exists() or not _is_kept(folder):
        return None
    try:
        head = Head(**json.loads((folder / _FILE).read_text()))
    except FileNotFoundError:  # it has just ended
        return None
    # The file may be left from a keeper that was killed, while the lock belongs to a new one.
    return head if holder_of(folder) == head.pid else None


def was_ended(home: Path) -> bool:
    """Return whether `end_head` has ended the cluster, and nobody has started it since."""
    return (_folder(home) / _ENDED).exists()


def end_head(home: Path) -> bool:
    """End the cluster of this home and all that runs on it; return whether it lived.

    Raises:
        UnreachableError: the cluster does not end in time.
    """
    if _folder(home).exists():
        (_folder(home) / _ENDED).touch()
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
    """Return whether a keeper lives: the operating system releases a lock when its holder ends."""
    try:
        FolderLock(folder).release()
    except ConflictError:
        return True
    return False


def keep(home: Path) -> None:
    """Start the cluster and keep it until SIGTERM, or until one of Ray's daemons dies.

    Raises:
        ConflictError: another keeper lives already.
        UnreachableError: Ray does not start here.
    """
    from workers.cluster.cluster import head_cluster

    folder = _folder(home)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: ending.set())
    lock = _acquire_lock(folder)
    (folder / _FILE).unlink(missing_ok=True)  # of a keeper that was killed
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
            _watch(folder, ending)
            (folder / _FILE).unlink(missing_ok=True)
    finally:
        lock.release()


def _watch(folder: Path, ending: threading.Event) -> None:
    """Wait for `ending`; end this process at once when the cluster has lost a daemon.

    Ray does not start its daemons again, and without one of them it may wait for ever, even while
    it is shut down. The guard cleans up.
    """
    from workers.cluster.ray_internals import dead_daemons

    while not ending.wait(_WATCH_SECONDS):
        if dead := dead_daemons():
            (folder / _FILE).unlink(missing_ok=True)
            sys.stderr.write(f"the cluster has ended: {', '.join(dead)} died\n")
            sys.stderr.flush()
            os._exit(_DAEMON_DIED)


def _acquire_lock(folder: Path) -> FolderLock:
    """Acquire the keeper's lock; retry, since `_is_kept` of another process holds it briefly."""
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
