"""Jobs from the control plane to a real Ray cluster and back, with a real kill -9 of the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kfac_dist.coordination.jobs.lifecycle import ENDED, JobState
from kfac_dist.coordination.jobs.runner import AttemptKey
from kfac_dist.runs import RunFolder
from kfac_dist.service.access.local import read_server
from kfac_dist.service.access.tokens import Tokens
from kfac_dist.service.client import Client
from kfac_dist.service.job_records import Job, Role
from kfac_dist.service.store import open_store
from tests.paths import ROOT
from tests.waiting import wait_until
from tests.workers.whole_jobs.jobs import TASK, line_spec
from workers.cluster.head import end_head, ensure_head, read_head
from workers.cluster.leftovers import processes_of

LEFT = """
import sys
from pathlib import Path
from kfac_dist.coordination.jobs.runner import AttemptKey
from workers.cluster.head import ensure_head
from workers.cluster.job_runner import RayJobRunner
runner = RayJobRunner.of_head(ensure_head(Path(sys.argv[1])))
key = AttemptKey(sys.argv[2], int(sys.argv[3]))
print(runner.remains(key), runner.status(key).is_over)
"""
pytestmark = pytest.mark.timeout(900)


class ControlPlane:
    """The process of `control_plane.py`, and a client of it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        store = open_store(f"sqlite:///{home}/store.db")
        self.token = Tokens(store).create("ada", Role.ADMIN)[1]
        store.close()
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.workers.whole_jobs.control_plane", str(self.home)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        server = read_server(self.home)
        assert server is not None
        self.client = Client(server.address, token=self.token)

    def kill(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def wait(self, job: Job, state: JobState) -> Job:
        def arrived() -> bool:
            now = self.client.get(job.id)
            assert now.state is state or now.state not in ENDED, now
            return now.state is state

        wait_until(arrived, f"{state} of {job.id}", seconds=400.0)
        return self.client.get(job.id)

    def wait_for_step(self, job: Job, step: int) -> None:
        def arrived() -> bool:
            now = self.client.get(job.id)
            assert now.state not in ENDED, now
            return now.step >= step

        wait_until(arrived, f"step {step} of {job.id}", seconds=400.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder; its cluster is ended after the tests."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder
        end_head(folder)


@pytest.fixture(scope="module")
def plane(home: Path) -> Iterator[ControlPlane]:
    running = ControlPlane(home)
    yield running
    running.kill()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "line.py").write_text(TASK)
    return tmp_path


def left_of(key: AttemptKey, home: Path) -> str:
    """Return what Ray and this machine still have of an attempt, and whether it is over.

    It asks in a process of its own, because the secret of a cluster is set for a whole process,
    and the cluster of the other tests has none.
    """
    command = [sys.executable, "-c", LEFT, str(home), key.job, str(key.attempt)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that its parent has not waited for yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def digits(**changes: Any) -> dict[str, Any]:
    """Return a smaller version of the demo job."""
    spec = {
        "name": "digits",
        "task": "autoencoder",
        "task_args": {"hidden": [20, 8]},
        "data": {"name": "mnist-5k", "limit": 300},
        "steps": 12,
        "batch_size": 60,
        "optimizer": {"inverse_update_period": 4},
        "staleness": {"max_steps": 8},
        "checkpoint": {"every_steps": 4},
    }
    return spec | changes


def test_one_job_is_cancelled_without_remains_and_the_other_succeeds(
    plane: ControlPlane, home: Path
) -> None:
    first = plane.client.submit(digits())
    second = plane.client.submit(digits(steps=100_000))
    plane.wait_for_step(second, 2)
    key = AttemptKey(second.id, 1)
    alive = {process.pid for process in processes_of(key.submission_id)}
    assert len(alive) >= 4  # the driver and the three roles
    plane.client.cancel(second.id)
    cancelled = plane.wait(second, JobState.CANCELLED)
    assert cancelled.message == "cancelled by request; nothing of it is left"
    assert not any(is_alive(pid) for pid in alive)
    assert left_of(key, home) == "[] True\n"

    done = plane.wait(first, JobState.SUCCEEDED)
    assert (done.step, done.attempt) == (12, 1)
    assert done.summary is not None
    assert done.summary["test"]["objective"] > 0
    (loss,) = plane.client.metrics(first.id, ["loss"])
    assert [point.step for point in loss.points] == list(range(1, 13))
    assert (Path(done.run_dir) / "report.html").exists()


def test_a_job_with_user_code_is_paused_and_resumed(plane: ControlPlane, code: Path) -> None:
    spec = line_spec(steps=400, checkpoint={"every_steps": 1000})
    job = plane.client.submit(spec, base_dir=code)
    plane.wait_for_step(job, 5)
    plane.client.pause(job.id)
    paused = plane.wait(job, JobState.PAUSED)
    assert 5 <= paused.step < 400
    assert plane.client.checkpoints(job.id)[0].step == paused.step
    assert processes_of(f"{job.id}-a1") == []
    plane.client.resume(job.id)
    ended = plane.wait(job, JobState.SUCCEEDED)
    assert (ended.step, ended.attempt) == (400, 2)
    assert plane.client.attempts(job.id)[1].resumed_from_step == paused.step
    (loss,) = plane.client.metrics(job.id, ["loss"])
    assert [point.step for point in loss.points] == list(range(1, 401))


def test_a_job_continues_while_the_server_is_killed_and_started_again(
    plane: ControlPlane, code: Path
) -> None:
    head = read_head(plane.home)
    job = plane.client.submit(line_spec(steps=600), base_dir=code)
    plane.wait_for_step(job, 5)
    plane.kill()
    folder = RunFolder.open(Path(job.run_dir))
    known = len(folder.read_metrics())
    wait_until(lambda: len(folder.read_metrics()) > known + 20, "steps without a server")
    plane.start()
    ended = plane.wait(job, JobState.SUCCEEDED)
    assert (ended.step, ended.attempt) == (600, 1)
    assert read_head(plane.home) == head
    (loss,) = plane.client.metrics(job.id, ["loss"])
    assert [point.step for point in loss.points] == list(range(1, 601))
    kinds = [event.kind for event in plane.client.events(job.id)]
    assert kinds.count("started") == kinds.count("attempt_started") == 1


def test_a_killed_driver_is_restarted_from_its_checkpoint(plane: ControlPlane, code: Path) -> None:
    job = plane.client.submit(line_spec(steps=300), base_dir=code)
    plane.wait_for_step(job, 9)
    log = Path(job.run_dir) / "logs" / "driver-0.log"
    os.kill(json.loads(log.read_text().splitlines()[0])["pid"], signal.SIGKILL)
    ended = plane.wait(job, JobState.SUCCEEDED)
    assert (ended.attempt, ended.num_restarts) == (2, 1)
    first, second = plane.client.attempts(job.id)
    assert (first.state, first.reason) == (JobState.FAILED, "driver_died")
    assert second.resumed_from_step is not None
    assert second.resumed_from_step >= 8


def test_a_cluster_that_dies_is_started_again_and_its_jobs_go_on(
    plane: ControlPlane, code: Path
) -> None:
    before = read_head(plane.home)
    assert before is not None
    job = plane.client.submit(line_spec(steps=300), base_dir=code)
    plane.wait_for_step(job, 9)
    (raylet,) = [
        process
        for process in psutil.Process(before.pid).children()
        if process.name().startswith("raylet")
    ]
    raylet.kill()  # the keeper notices it, and everything of this cluster ends
    ended = plane.wait(job, JobState.SUCCEEDED)
    assert (ended.attempt, ended.num_restarts) == (2, 1)
    first, second = plane.client.attempts(job.id)
    assert first.state is JobState.FAILED
    assert first.reason in ("driver_died", "worker_died", "node_lost")
    assert second.resumed_from_step is not None
    assert second.resumed_from_step >= 8
    after = read_head(plane.home)
    assert after is not None
    assert after.pid != before.pid


def test_an_error_in_user_code_fails_the_job(plane: ControlPlane, code: Path) -> None:
    spec = line_spec(steps=1000, task_args={"breaks_after": 10})
    failed = plane.wait(plane.client.submit(spec, base_dir=code), JobState.FAILED)
    assert (failed.reason, failed.attempt) == ("user_task", 1)
    assert "LookupError: no such column" in str(failed.message)
    assert failed.first_failure is not None
    assert failed.first_failure.role == "gradient_worker"

    (code / "line.py").write_text("import none_such\n")
    failed = plane.wait(plane.client.submit(line_spec(), base_dir=code), JobState.FAILED)
    assert failed.reason == "user_task"
    assert "none_such" in str(failed.message)


def test_the_cluster_ends_with_its_keeper(tmp_path: Path) -> None:
    head = ensure_head(tmp_path)
    assert ensure_head(tmp_path) == head
    keeper = psutil.Process(head.pid)
    family = keeper.children(recursive=True)
    keeper.kill()
    wait_until(lambda: not any(process.is_running() for process in family), "the end of all")
    assert read_head(tmp_path) is None
    assert not end_head(tmp_path)
