"""Cleans up after an embedded Ray cluster, even when the driver was killed with SIGKILL.

Ray's agents outlive their raylet if nobody stops them. So a small separate process, the guard,
waits for the driver's end. Then it ends every process that has a file open in the cluster's private
folder, and removes the folder. This module runs as a script, so it imports the standard library
only.
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

_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.05


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Clean up `folder` and its processes after the block, or after this process was killed."""
    guard = subprocess.Popen(
        [sys.executable, "-I", __file__, str(folder), str(os.getpid())],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in a terminal must reach the driver only
    )
    try:
        yield
    finally:
        clean_up(folder, spared=os.getpid())
        guard.communicate()


def clean_up(folder: Path, *, spared: int) -> None:
    """End all processes that have a file open in `folder`, and remove the folder.

    The process `spared` is left alone: the driver itself keeps Ray's log files open until its end.
    """
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline:
        pids = list(_users(folder, spared))
        for pid in pids:
            _kill(pid)
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


if __name__ == "__main__":
    sys.stdin.read()  # the pipe from the driver closes when the driver ends, however it ends
    clean_up(Path(sys.argv[1]), spared=int(sys.argv[2]))
