"""Nothing is left of an embedded cluster, even if its owner was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from tests.waiting import wait_until
from workers.cluster.guard import clean_up, guarded

HOLDER = "import sys, time; file = open(sys.argv[1], 'w'); time.sleep(600)"
OWNER = f"""\
import subprocess, sys, time
from pathlib import Path
from workers.cluster.guard import guarded
folder = Path(sys.argv[1])
with guarded(folder):
    command = [sys.executable, "-c", {HOLDER!r}, str(folder / "log")]
    print(subprocess.Popen(command, start_new_session=True).pid, flush=True)
    time.sleep(600)
"""


def test_processes_with_files_in_the_folder_are_ended(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    folder.mkdir()
    with guarded(folder):
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder / "log")])
        wait_until((folder / "log").exists, "the open file")
    assert holder.wait(timeout=10) == -9
    assert not folder.exists()


def test_a_killed_owner_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    folder.mkdir()
    command = [sys.executable, "-c", OWNER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        holder = psutil.Process(int(owner.stdout.readline()))
        wait_until((folder / "log").exists, "the open file")
        owner.kill()
    wait_until(lambda: not folder.exists(), "the end of the folder")
    wait_until(lambda: not holder.is_running(), "the end of its process")


def test_a_neighbour_with_a_similar_name_is_left_alone(tmp_path: Path) -> None:
    folder, neighbour = tmp_path / "kfac-1", tmp_path / "kfac-12"
    for path in (folder, neighbour):
        path.mkdir()
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(neighbour / "log")])
    try:
        wait_until((neighbour / "log").exists, "the open file")
        clean_up(folder, spared=os.getpid())
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    assert neighbour.exists()
