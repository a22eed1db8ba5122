"""The hidden command `driver`, in the parts that run without a cluster."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kfac_dist.coordination.jobs.lifecycle import JobState, Trigger
from kfac_dist.runs.transfer.package import pack
from kfac_dist.service.control.launching import begin_attempt, prepare_folder, read_launch
from kfac_dist.service.job_records import Job
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.reporting.run_reader import RunReader
from kfac_dist.service.store import open_store
from kfac_dist.service.store.job_rows import move
from tests.paths import ROOT
from workers.cluster.job_runner import DRIVER


@pytest.fixture
def jobs(tmp_path: Path) -> Any:
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    yield Jobs(store, tmp_path)
    store.close()


def prepared(jobs: Jobs, source: str, **changes: Any) -> Job:
    """A job with this user code whose first attempt waits for its driver."""
    code = jobs.home / "code"
    code.mkdir()
    (code / "own.py").write_text(source)
    spec = {"name": "own", "task": "own.py:Task", "steps": 2, "batch_size": 2, **changes}
    job = jobs.create(spec, owner="ada", package=pack(code))
    with jobs.change(job.id) as (session, row):
        move(session, row, Trigger.ENQUEUE, 1.0)
        begin_attempt(session, row, "secret", resumes=False, now=2.0)
    prepare_folder(jobs, jobs.get(job.id), "secret")
    return jobs.get(job.id)


def drive(
    job: Job, attempt: int, started_in: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DRIVER, job.run_dir, str(attempt)],
        cwd=started_in,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_only_the_driver_can_read_its_secret(jobs: Jobs) -> None:
    job = prepared(jobs, "class Task: ...\n")
    token = Path(job.run_dir) / "report.token"
    assert token.read_text() == "secret"
    assert token.stat().st_mode & 0o777 == 0o600
    launch = json.loads((Path(job.run_dir) / "launch.json").read_text())
    assert "secret" not in json.dumps(launch)
    assert (Path(job.run_dir) / "code" / "own.py").read_text() == "class Task: ...\n"


def test_a_later_attempt_resumes_a_run_that_only_its_storage_has(jobs: Jobs) -> None:
    job = prepared(jobs, "class Task: ...\n", storage=f"file://{jobs.home}/storage")
    assert not read_launch(Path(job.run_dir)).resume
    with jobs.change(job.id) as (_, row):
        row.attempt = 2
    prepare_folder(jobs, jobs.get(job.id), "secret")
    assert read_launch(Path(job.run_dir)).resume


def test_the_driver_of_a_replaced_attempt_does_nothing(jobs: Jobs) -> None:
    job = prepared(jobs, "class Task: ...\n")
    done = drive(job, 7)
    assert done.returncode == 9
    assert "attempt 1 has replaced attempt 7" in done.stderr
    assert not (Path(job.run_dir) / "driver.json").exists()


def test_a_failure_before_the_run_is_reported(jobs: Jobs) -> None:
    job = prepared(jobs, "raise LookupError('no such column')\n")
    assert drive(job, 1).returncode == 1
    state = RunReader(Path(job.run_dir), job.id, 1).read().state
    assert state is not None
    assert (state.state, state.reason) == (JobState.FAILED, "user_task")
    assert "LookupError: no such column" in str(state.message)
    log = (Path(job.run_dir) / "logs" / "driver-0.log").read_text()
    assert "the driver has started" in log
    assert "no such column" in log


def test_the_folder_in_which_the_cluster_was_started_plays_no_role(
    jobs: Jobs, tmp_path: Path
) -> None:
    source = "import os, sys\nraise LookupError(f'in {os.getcwd()}, from {sys.path}')\n"
    job = prepared(jobs, source)
    started_in = tmp_path / "elsewhere"
    started_in.mkdir()
    (started_in / "queue.py").write_text("raise SystemExit('the wrong queue')\n")
    assert drive(job, 1, started_in).returncode == 1
    state = RunReader(Path(job.run_dir), job.id, 1).read().state
    assert state is not None
    assert f"in {job.run_dir}/code, from" in str(state.message)
    assert str(started_in) not in str(state.message)
