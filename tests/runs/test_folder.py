from __future__ import annotations

import fcntl
import json
import math
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kfac_dist.errors import (
    ConflictError,
    JobFailedError,
    KfacDistError,
    NotFoundError,
    UsageError,
)
from kfac_dist.runs import (
    Event,
    JobSummary,
    RunFolder,
    StalenessSummary,
    WorkerCounts,
    check_folder,
)

from .samples import sample_record, sample_spec


def test_a_new_folder_holds_the_specification_and_the_job(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "deep" / "run", sample_spec()) as folder:
        job = folder.read_job()
        assert folder.read_spec() == sample_spec()
        assert job.job.startswith("digits-")
        assert (job.state, job.attempt, job.step) == ("STARTING", 1, 0)
        assert folder.places.checkpoints.is_dir()
        assert folder.places.log("inverse_worker", 0).name == "inverse_worker-0.log"
        assert folder.places.log("inverse_worker", 0, attempt=2).name == "inverse_worker-0.a2.log"
        assert folder.read_summary() is None


def test_an_occupied_folder_names_the_job_and_both_ways_out(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, sample_spec()) as folder:
        job = folder.update_job(state="SUCCEEDED", step=300)
    with pytest.raises(ConflictError) as caught:
        RunFolder.create(tmp_path, sample_spec())
    for part in (job.job, "SUCCEEDED", "step 300", "--resume", "--run-dir"):
        assert part in caught.value.message


def test_a_run_whose_process_is_gone_reads_interrupted_at_its_true_step(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, sample_spec()) as folder:
        folder.update_job(state="RUNNING")
        for step in (1, 2, 7):
            folder.append_metrics(sample_record(step))
        job = RunFolder.open(tmp_path).read_job()  # as another process sees it meanwhile
        assert (job.state, job.step) == ("RUNNING", 7)
    job = RunFolder.open(tmp_path).read_job()
    assert (job.state, job.step, job.reason) == ("INTERRUPTED", 7, "driver_died")
    with pytest.raises(ConflictError, match="INTERRUPTED, step 7"):
        RunFolder.create(tmp_path, sample_spec())
    with RunFolder.resume(tmp_path, sample_spec()) as folder:
        folder.begin_attempt(sample_spec())
        assert folder.read_job().state == "STARTING"
        folder.update_job(state="FAILED", step=9)
    assert RunFolder.open(tmp_path).read_job().state == "FAILED"


def test_looking_at_a_run_does_not_keep_a_writer_out(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, sample_spec()).close()
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # a reader in the middle of its look
        timer = threading.Timer(0.03, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        timer.start()
        RunFolder.resume(tmp_path, sample_spec()).close()
        timer.join()


def test_two_processes_in_one_folder_conflict(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, sample_spec()):
        script = (
            "import sys\n"
            "from pathlib import Path\n"
            "from kfac_dist.runs import RunFolder\n"
            "folder = Path(sys.argv[1])\n"
            "RunFolder.resume(folder, RunFolder.open(folder).read_spec())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True
        )
    assert "ConflictError" in done.stderr
    assert "another process (pid " in done.stderr
    RunFolder.resume(tmp_path, sample_spec()).close()  # the lock is free again


def test_a_failed_begin_releases_the_lock(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, sample_spec()).close()
    with pytest.raises(ConflictError):
        RunFolder.create(tmp_path, sample_spec())
    RunFolder.resume(tmp_path, sample_spec()).close()


def test_resume_counts_attempts_and_removes_the_last_result(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, sample_spec()) as folder:
        job = folder.update_job(state="FAILED", reason="worker_died", message="x", step=120)
        folder.write_summary(_summary(job.job, tmp_path))
    with RunFolder.resume(tmp_path, sample_spec(steps=900)) as folder:
        assert folder.read_job() == job
        assert folder.read_summary() is not None
        folder.begin_attempt(sample_spec(steps=900))
        resumed = folder.read_job()
        assert (resumed.job, resumed.attempt, resumed.state) == (job.job, 2, "STARTING")
        assert (resumed.reason, resumed.message) == (None, None)
        assert folder.read_summary() is None
        assert folder.read_spec().steps == 900


def test_a_run_that_is_in_a_storage_need_not_be_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no run to resume here"):
        check_folder(tmp_path / "none", sample_spec(), resume=True)
    check_folder(tmp_path / "none", sample_spec(storage="memory:///x"), resume=True)
    RunFolder.create(tmp_path, sample_spec()).close()
    check_folder(tmp_path, sample_spec(storage="memory:///x"), resume=True)  # it may be added


def test_resume_needs_a_run_of_the_same_job(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no run to resume"):
        RunFolder.resume(tmp_path / "none", sample_spec())
    RunFolder.create(tmp_path, sample_spec()).close()
    other = sample_spec(seed=3, optimizer={"l2": 0.5}, workers={"gradient": 2})
    with pytest.raises(ConflictError) as caught:
        RunFolder.resume(tmp_path, other)
    assert "optimizer.l2 is 1e-05 there, 0.5 here" in caught.value.message
    assert "seed is 0 there, 3 here" in caught.value.message
    assert "workers" not in caught.value.message


def test_open_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"job\.json"):
        RunFolder.open(tmp_path)


def test_a_path_that_cannot_be_a_folder_is_the_users_mistake(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="cannot be a run folder"):
        RunFolder.create(file / "run", sample_spec())
    with pytest.raises(UsageError, match="cannot be a run folder"):
        RunFolder.create(file, sample_spec())


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    record = sample_record(1, inverse_version_step={"fc": 1}, numeric_events={"bad_step": 2})
    event = Event(kind="worker_died", message="gone", step=1, severity="error", role="x", rank=1)
    with RunFolder.create(tmp_path, sample_spec()) as folder:
        folder.append_metrics(record)
        folder.append_event(event)
        summary = _summary("digits-1", tmp_path)
        folder.write_summary(summary)
    reader = RunFolder.open(tmp_path)
    assert reader.read_metrics() == [record]
    assert reader.read_events() == [event]
    assert reader.read_summary() == summary


def test_a_number_that_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, sample_spec()) as folder:
        folder.append_metrics(sample_record(1, loss=math.nan, objective=math.inf))
        line = json.loads((tmp_path / "metrics.jsonl").read_text())
        assert (line["loss"], line["objective"]) == (None, None)
        assert math.isnan(folder.read_metrics()[0].loss)


def test_a_torn_last_line_is_skipped_and_removed_by_the_next_append(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with RunFolder.create(tmp_path, sample_spec()) as folder:
        folder.append_metrics(sample_record(1))
    metrics.write_text(metrics.read_text() + '{"step": 2, "lo')
    with RunFolder.resume(tmp_path, sample_spec()) as folder:
        assert [record.step for record in folder.read_metrics()] == [1]
        folder.append_metrics(sample_record(2))
        assert [record.step for record in folder.read_metrics()] == [1, 2]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, sample_spec()).close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1\n')
    with pytest.raises(KfacDistError, match="line 1 is damaged"):
        RunFolder.open(tmp_path).read_metrics()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(KfacDistError, match="has a record that is damaged: time"):
        RunFolder.open(tmp_path).read_metrics()
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(KfacDistError, match="is damaged: job"):
        RunFolder.open(tmp_path).read_job()


def test_steps_done_again_hide_the_earlier_ones_and_all_after(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, sample_spec()) as folder:
        for step in (1, 2, 3, 4):
            folder.append_metrics(sample_record(step, loss=1.0))
        folder.append_metrics(sample_record(3, loss=2.0))
        assert [(r.step, r.loss) for r in folder.read_metrics()] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_truncated_metrics_can_be_appended_to(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, sample_spec()) as folder:
        for step in (1, 2, 3, 4):
            folder.append_metrics(sample_record(step))
        folder.truncate_metrics_after(2)
        assert [record.step for record in folder.read_metrics()] == [1, 2]
        folder.append_metrics(sample_record(3))
        assert [record.step for record in folder.read_metrics()] == [1, 2, 3]


def _summary(job: str, path: Path) -> JobSummary:
    return JobSummary(
        job=job,
        state="FAILED",
        step=120,
        wall_seconds=3.0,
        inverse_staleness_steps=StalenessSummary(mean=1.5, max=3),
        workers=WorkerCounts(gradient=1, inverse=1, parameter_server=1),
        run_dir=str(path),
    )


@pytest.mark.parametrize("end", ["removed", "moved", "emptied"])
def test_a_run_folder_that_is_gone_is_noticed_at_the_next_write(tmp_path: Path, end: str) -> None:
    run = tmp_path / "run"
    with RunFolder.create(run, sample_spec()) as folder:
        folder.append_metrics(sample_record(1))
        if end == "moved":
            run.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(run)
        if end == "emptied":
            run.mkdir()
        writes = [
            lambda: folder.append_metrics(sample_record(2)),
            lambda: folder.update_job(state="RUNNING"),
        ]
        for write in writes:
            with pytest.raises(JobFailedError) as caught:
                write()
            assert str(run) in caught.value.message
            if end == "emptied":
                assert caught.value.reason == "run_folder_not_written"
            else:
                assert caught.value.reason == "run_folder_lost"
                assert "removed, moved or unmounted" in caught.value.message
    assert run.exists() is (end == "emptied")


def test_damaged_lines_can_be_left_out_and_named(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, sample_spec()) as folder:
        for step in (1, 2, 3):
            folder.append_metrics(sample_record(step))
        lines = folder.places.metrics.read_text().splitlines()
        lines[1] = lines[1][:20] + "\0\0" + lines[1][22:]
        lines.append('{"step": 4}')
        folder.places.metrics.write_text("\n".join(lines) + "\n")
        damages: list[str] = []
        assert [record.step for record in folder.read_metrics(damages)] == [1, 3]
        assert len(damages) == 2
        assert "line 2 is damaged" in damages[0]
        assert "damaged" in damages[1]
        with pytest.raises(KfacDistError, match="line 2"):
            folder.read_metrics()
