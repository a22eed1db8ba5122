"""Nothing is left of an embedded cluster, even if its owner was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kfac_dist.runs import RunFolder
from tests.runs.samples import sample_record, sample_spec
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


MARKED = """\
import os, subprocess, sys, time
from pathlib import Path
from workers.cluster.guard import guarded
from workers.cluster.leftovers import marking
folder = Path(sys.argv[1])
with guarded(folder, "train-test-of-the-guard"), marking("train-test-of-the-guard"):
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    print(subprocess.Popen(command, start_new_session=True).pid, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("end", ["normal", "killed"])
def test_processes_with_the_mark_end_however_the_owner_ends(tmp_path: Path, end: str) -> None:
    folder = tmp_path / "cluster"
    folder.mkdir()
    command = [sys.executable, "-c", MARKED, str(folder), end]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    child = int(done.stdout)
    assert done.returncode == (0 if end == "normal" else -9)
    wait_until(lambda: not psutil.pid_exists(child), "the end of the marked process")
    wait_until(lambda: not folder.exists(), "the end of the folder")


LOST = """\
import os, sys
from pathlib import Path
from workers.cluster.guard import guarded
folder = Path(sys.argv[1])
with guarded(folder, run_dir=Path(sys.argv[2])):
    logs = folder / "session_1" / "logs"
    logs.mkdir(parents=True)
    (logs / f"python-core-driver-01_{os.getpid()}.log").write_text(sys.argv[3])
    os._exit(1)
"""
RAYS_LAST_WORDS = (
    "[W] Exiting because the Raylet IPC connection failed and the local Raylet is dead."
)


@pytest.mark.parametrize("log", [RAYS_LAST_WORDS, "nothing special"])
def test_a_run_whose_driver_ray_ended_is_recorded_as_lost(tmp_path: Path, log: str) -> None:
    cluster, run = tmp_path / "cluster", tmp_path / "run"
    cluster.mkdir()
    with RunFolder.create(run, sample_spec()) as folder:
        folder.update_job(state="RUNNING")
        folder.append_metrics(sample_record(7))
    command = [sys.executable, "-c", LOST, str(cluster), str(run), log]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    job = RunFolder.open(run).read_job()
    assert job.step == 7
    if log is RAYS_LAST_WORDS:
        assert (job.state, job.reason) == ("FAILED", "node_lost")
        assert done.stderr == f"error: {job.message}\n"
        (event,) = RunFolder.open(run).read_events()
        assert (event.kind, event.message) == ("failed", job.message)
    else:
        assert (job.state, done.stderr) == ("INTERRUPTED", "")
