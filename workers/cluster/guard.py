"""Cleans up after an embedded Ray cluster, even when the driver was killed with SIGKILL.

Ray's agents outlive their raylet if nobody stops them, and so do processes that user code started.
So a small separate process, the guard, waits for the driver's end. Then it ends every process that
has a file open in the cluster's private folder or the cluster's mark in its environment, and
removes the folder. It also records how a run ended whose driver could not: Ray may end a
driver silently when its raylet dies.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workers.cluster.leftovers import kill_processes, processes_of

_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_GOODBYE = b"the driver has ended by itself"
# What Ray writes into the driver's log in the folder before it ends the driver.
_RAYLET_DIED = (b"the local Raylet is dead", b"because the local raylet failed")
_START = "import sys; sys.path[:] = sys.argv[1].split({!r}); from workers.cluster import guard; {}"
_COMMAND = _START.format(os.pathsep, "guard.main(*sys.argv[2:])")


@contextmanager
def guarded(folder: Path, mark: str = "", run_dir: Path | None = None) -> Iterator[None]:
    """Clean up `folder` and its processes after the block, or after this process was killed.

    Args:
        folder: the private folder of the cluster.
        mark: its processes, and theirs, have this as the value of MARK in their environment.
        run_dir: the folder of the run whose end is recorded if this process cannot.
    """
    arguments = [str(folder), str(os.getpid()), mark, "" if run_dir is None else str(run_dir)]
    guard = subprocess.Popen(
        # It has the modules of this process, and nothing from the environment.
        [sys.executable, "-I", "-c", _COMMAND, os.pathsep.join(sys.path), *arguments],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in a terminal must reach the driver only
    )
    try:
        yield
    finally:
        clean_up(folder, spared=os.getpid(), mark=mark)
        guard.communicate(_GOODBYE)


def main(folder: str, driver: str, mark: str, run_dir: str) -> None:
    """Wait for the end of the process `driver`, and clean up after it."""
    # The pipe from the driver closes when the driver ends, however it ends.
    said_goodbye = sys.stdin.buffer.read() == _GOODBYE
    if run_dir and not said_goodbye and _raylet_died(Path(folder), driver):
        from workers.cluster.lost import record_lost  # takes a while to load

        record_lost(Path(run_dir))
    clean_up(Path(folder), spared=int(driver), mark=mark)


def _raylet_died(folder: Path, driver: str) -> bool:
    """Return whether Ray ended the driver because its raylet had died."""
    logs = folder.glob(f"session_*/logs/python-core-driver-*_{driver}.log")
    texts = [log.read_bytes() for log in logs]
    return any(sentence in text for text in texts for sentence in _RAYLET_DIED)


def clean_up(folder: Path, *, spared: int, mark: str = "") -> None:
    """End all processes that have a file open in `folder` or have the mark; remove the folder.

    The process `spared` is left alone: the driver itself keeps Ray's log files open until its end.
    """
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline:
        pids = list(_users(folder, spared))
        for pid in pids:
            _kill(pid)
        if mark:
            kill_processes(mark)
            pids += [process.pid for process in processes_of(mark)]
        # A dying process may still write a file while the folder is being removed, so errors are
        # ignored here and the next round tries again.
        shutil.rmtree(folder, ignore_errors=True)
        if not pids and not folder.exists():
            return
        time.sleep(_POLL_SECONDS)


def _users(folder: Path, spared: int) -> Iterator[int]:
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) not in (os.getpid(), spared):
            prefix = f"{folder}/"
            if any(target.startswith(prefix) for target in _open_files(process)):
                yield int(process.name)


def _open_files(process: Path) -> Iterator[str]:
    try:
        for link in (process / "fd").iterdir():
            yield os.readlink(link)  # noqa: PTH115 - the target may be a deleted file
    except OSError:  # the process or file is gone by now, or belongs to another user
        return


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
