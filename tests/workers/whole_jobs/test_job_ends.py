"""How jobs end when user code, the run folder or the records give trouble."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kfac_dist.config import parse_spec
from kfac_dist.errors import JobFailedError, WorkerDiedError
from tests.workers.whole_jobs.jobs import TASK, Jobs, line_spec

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path)


def test_user_code_that_ends_the_process_is_named_with_its_exit_code(jobs: Jobs) -> None:
    leaving = TASK.replace('raise LookupError("no such column")', "__import__('os')._exit(17)")
    (jobs.folder / "line.py").write_text(leaving)
    spec = line_spec(steps=1000, task_args={"breaks_after": 30})
    with pytest.raises(WorkerDiedError, match=r"os\._exit\(17\) was called at .*line\.py:"):
        jobs.run(parse_spec(spec))


def test_a_run_folder_that_is_removed_ends_the_job_at_its_next_step(jobs: Jobs) -> None:
    def remove(record: object) -> None:
        if len(jobs.records) == 5:
            shutil.rmtree(jobs.folder / "run")

    jobs.on_step = remove
    with pytest.raises(JobFailedError, match="was removed, moved or unmounted") as caught:
        jobs.run(parse_spec(line_spec(steps=100_000)))
    assert caught.value.reason == "run_folder_lost"
    assert len(jobs.records) <= 6
    assert not (jobs.folder / "run").exists()


def test_a_damaged_record_is_a_warning_of_a_job_that_diverged(jobs: Jobs) -> None:
    def damage(record: object) -> None:
        if len(jobs.records) == 5:
            metrics = jobs.run_folder().places.metrics
            with metrics.open("r+b") as file:
                file.write(b"\0\0\0")

    jobs.on_step = damage
    spec = line_spec(optimizer={"name": "sgd", "lr": 30.0}, faults={"max_bad_steps": 1000})
    summary = jobs.run(parse_spec(spec))
    assert (summary.state, summary.reason) == ("SUCCEEDED", "diverged")
    assert summary.message == jobs.event("diverged").message
    assert jobs.run_folder().read_job().reason == "diverged"
    assert "line 1 is damaged" in jobs.event("records_damaged").message
    assert jobs.run_folder().places.report.exists()
