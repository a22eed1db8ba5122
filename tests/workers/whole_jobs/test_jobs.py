"""Whole jobs on real Ray actors, in a cluster that this process has initialised."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.numpy import load

from kfac_dist import train
from kfac_dist.config import parse_spec
from kfac_dist.core.vector import flatten
from kfac_dist.errors import (
    DataError,
    InvalidSpecError,
    JobFailedError,
    NumericError,
    UserTaskError,
    WorkerDiedError,
)
from kfac_dist.runs import JobSummary
from tests.workers.whole_jobs.jobs import TASK, Jobs, line_spec
from tests.workers.whole_jobs.test_distributed_is_serial import serial_run
from workers.driver import preparation

BAD = """
from pathlib import Path

class Bad(Line):
    def train_data(self, data_dir):
        data = super().train_data(data_dir)
        data.tensors[0][int(Path("bad.txt").read_text())] = float("nan")
        return data
"""

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path)


def checkpointed(jobs: Jobs, role: str, step: int) -> bytes:
    return (jobs.checkpoint(step) / f"{role}.safetensors").read_bytes()


def parameters(jobs: Jobs, step: int) -> torch.Tensor:
    return torch.from_numpy(load(checkpointed(jobs, "parameter_server", step))["parameters"])


def test_a_job_resumed_on_other_numbers_of_workers_equals_the_serial_optimizer(jobs: Jobs) -> None:
    half = jobs.run(parse_spec(line_spec(steps=6)))
    assert jobs.kinds() == ["started", "checkpoint", "checkpoint", "succeeded"]
    spec = parse_spec(line_spec(workers={"gradient": 2, "inverse": 2}))
    resumed = jobs.run(spec, resume=True)
    assert (resumed.job, resumed.step) == (half.job, 12)
    assert resumed.initial_objective == half.initial_objective
    assert jobs.run_folder().read_job().attempt == 2
    assert [record.step for record in jobs.run_folder().read_metrics()] == list(range(1, 13))
    serial, results = serial_run(spec, jobs.folder, 12)
    expected = flatten(serial._parameters)
    torch.testing.assert_close(parameters(jobs, 12), expected, rtol=1e-9, atol=1e-12)
    assert jobs.records[0].objective == results[0].objective

    again = jobs.run(parse_spec(line_spec()), resume=True)
    assert (again.state, again.step) == ("SUCCEEDED", 12)
    assert again.train == pytest.approx(resumed.train, rel=1e-12)
    assert ray.is_initialized()

    with pytest.raises(InvalidSpecError, match=r"steps: 11 is below .* checkpoint, 12 \("):
        jobs.run(parse_spec(line_spec(steps=11)), resume=True)
    job = jobs.run_folder().read_job()
    assert (job.state, job.attempt) == ("SUCCEEDED", 3)


def test_buffers_are_shared_saved_and_restored(jobs: Jobs) -> None:
    def trained(gradient: int, *, resume: bool) -> JobSummary:
        workers = {"gradient": gradient}
        spec = line_spec(steps=8, task_args={"normalised": True}, workers=workers)
        return jobs.run(parse_spec(spec), resume=resume)

    def saved() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}

    newest = jobs.folder / "run" / "checkpoints" / "step-00000008"
    straight = trained(2, resume=False)
    expected = saved()
    assert "buffers.safetensors" in expected
    shutil.rmtree(newest)
    trained(2, resume=True)  # from step 4
    assert saved() == expected
    alone = trained(1, resume=True)  # from step 8: it only evaluates
    assert alone.test == pytest.approx(straight.test, rel=1e-12)


def test_a_model_that_raises_in_a_worker_ends_the_job_with_its_message(jobs: Jobs) -> None:
    spec = line_spec(steps=1000, task_args={"breaks_after": 30}, workers={"gradient": 2})
    with pytest.raises(UserTaskError, match=r"LookupError: no such column \(line.py:") as caught:
        jobs.run(parse_spec(spec))
    assert caught.value.first_failure is not None
    assert caught.value.first_failure.role == "gradient_worker"
    job = jobs.run_folder().read_job()
    assert (job.state, job.reason) == ("FAILED", "user_task")
    assert job.step == jobs.records[-1].step, "a window in which a step fails is not recorded"
    summary = jobs.run_folder().read_summary()
    assert summary is not None
    assert summary.message == caught.value.message
    printed = jobs.run_folder().places.printed("gradient_worker", 1).read_text()
    assert "building the model" in printed


def test_data_are_checked_in_the_workers_in_the_folder_of_the_task(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "_CHECK_SECONDS", 0.0)
    (jobs.folder / "bad.txt").write_text("40")
    with (jobs.folder / "line.py").open("a") as file:
        file.write(BAD)
    with pytest.raises(DataError, match="train data, input of case 40 at position 0 is nan") as e:
        jobs.run(parse_spec(line_spec(task="line.py:Bad")))
    assert (e.value.reason, e.value.first_failure.role) == ("bad_data", "gradient_worker")
    said = jobs.event("data_checked_in_part").message
    assert said.startswith("reading the train data set: 2 of 64 cases were read and checked in")
    assert jobs.kinds()[-1] == "failed"


def test_too_many_steps_without_a_finite_update_end_the_job(jobs: Jobs) -> None:
    spec = line_spec(
        steps=1000,
        task_args={"breaks_after": 30, "how": "nan"},
        faults={"max_bad_steps": 2},
        staleness={"max_steps": 4},
    )
    with pytest.raises(NumericError, match="3 steps in a row"):
        jobs.run(parse_spec(spec))
    assert jobs.records[-1].numeric_events["bad_step"] == 3
    assert jobs.records[-1].parameter_version == jobs.records[-1].step - 3


class Recovered(Exception):  # noqa: N818 - ends the endless jobs of these tests
    pass


def run_until_recovered(jobs: Jobs, sent: signal.Signals, spec: dict[str, Any]) -> None:
    """Send a signal to inverse worker 0 at step 6, and train until all its layers are back."""

    def hit_one(record: object) -> None:
        if "recovered" in jobs.kinds():
            raise Recovered
        if len(jobs.records) == 6:
            os.kill(jobs.pid("inverse_worker"), sent)

    jobs.on_step = hit_one
    with pytest.raises(Recovered):
        jobs.run(parse_spec(spec))
    died = jobs.event("inverse_worker_died")
    assert died.details["pid"] != jobs.event("inverse_worker_replaced").details["pid"]
    assert jobs.run_folder().read_job().state == "FAILED"


def test_a_killed_inverse_worker_is_replaced(jobs: Jobs) -> None:
    spec = line_spec(
        steps=100_000,
        task_args={"depth": 3},
        staleness={"max_steps": 20},
        workers={"gradient": 2, "inverse": 2},
    )
    spec["optimizer"]["inverse"] = "block_tridiagonal"  # neighbouring workers share statistics
    run_until_recovered(jobs, signal.SIGKILL, spec)
    degraded = [record for record in jobs.records if record.stale_applied_total > 0]
    worst = max(r.inverse_staleness_steps.max for r in jobs.records if r.inverse_staleness_steps)
    assert bool(degraded) == (worst > 20)


def test_a_stalled_inverse_worker_is_replaced(jobs: Jobs) -> None:
    spec = line_spec(
        steps=100_000, workers={"gradient": 1, "inverse": 2}, faults={"stall_seconds": 2.0}
    )
    spec["optimizer"]["inverse"] = "ekfac"
    run_until_recovered(jobs, signal.SIGSTOP, spec)
    assert jobs.event("inverse_worker_died").details["exit"] == "stalled"


def test_a_checkpoint_has_the_last_factors_of_a_worker_that_died(jobs: Jobs) -> None:
    def kill_one(record: object) -> None:
        if len(jobs.records) == 8:
            os.kill(jobs.pid("inverse_worker"), signal.SIGKILL)

    jobs.on_step = kill_one
    jobs.run(parse_spec(line_spec(staleness={"max_steps": 20})))
    missing = [event.step for event in jobs.events if event.kind == "factors_missing"]
    assert missing[0] == 8
    before = checkpointed(jobs, "factors", 4)
    # At step 12 the successor may be ready, or still be starting.
    assert missing == [step for step in (8, 12) if checkpointed(jobs, "factors", step) == before]


def test_more_deaths_than_allowed_end_the_job(jobs: Jobs) -> None:
    def kill_one(record: object) -> None:
        if len(jobs.records) == 3:
            os.kill(jobs.pid("inverse_worker"), signal.SIGKILL)

    jobs.on_step = kill_one
    spec = line_spec(steps=100_000, staleness={"max_steps": 20}, faults={"max_restarts": 0})
    with pytest.raises(WorkerDiedError, match="max_restarts is 0"):
        jobs.run(parse_spec(spec))


@pytest.mark.parametrize(
    ("role", "every_steps", "resumed"),
    [("gradient_worker", 4, "from the checkpoint of step 4"), ("parameter_server", None, "start")],
)
def test_a_killed_member_of_the_group_is_named_if_no_restart_is_allowed(
    jobs: Jobs, role: str, every_steps: int | None, resumed: str
) -> None:
    def kill_one(record: object) -> None:
        if len(jobs.records) == 5:
            os.kill(jobs.pid(role), signal.SIGKILL)

    jobs.on_step = kill_one
    spec = line_spec(
        steps=100_000,
        workers={"gradient": 2},
        checkpoint={"every_steps": every_steps},
        faults={"max_restarts": 0},
    )
    with pytest.raises(WorkerDiedError) as caught:
        jobs.run(parse_spec(spec))
    first = caught.value.first_failure
    assert first is not None
    assert (first.role, first.rank) == (role, 0)
    assert '"built"' in first.log_tail
    jobs.on_step = lambda record: None
    assert jobs.run(parse_spec(spec | {"steps": 8}), resume=True).state == "SUCCEEDED"
    assert resumed in jobs.event("resumed").message
    assert [record.step for record in jobs.run_folder().read_metrics()] == list(range(1, 9))


def test_a_task_that_hangs_is_killed_and_named_and_not_the_workers_that_wait(jobs: Jobs) -> None:
    spec = line_spec(
        steps=1000,
        task_args={"breaks_after": 30, "how": "hang"},
        workers={"gradient": 2},
        faults={"step_seconds": 1.5, "max_restarts": 0},
    )
    with pytest.raises(WorkerDiedError, match=r"gradient worker \d \(pid \d+\) stalled") as caught:
        jobs.run(parse_spec(spec))
    assert "its work, 'step: " in caught.value.message
    assert "faults.step_seconds is 1.5" in caught.value.message
    assert caught.value.first_failure.role == "gradient_worker"


def test_a_server_that_is_stopped_in_an_evaluation_is_named(jobs: Jobs) -> None:
    def stop_it(record: object) -> None:
        if len(jobs.records) == 11:
            os.kill(jobs.pid("parameter_server"), signal.SIGSTOP)

    jobs.on_step = stop_it
    spec = line_spec(
        evaluation={"every_steps": 12},
        checkpoint={"every_steps": None},
        faults={"stall_seconds": 2.0, "max_restarts": 0},
    )
    with pytest.raises(WorkerDiedError, match=r"parameter server 0 \(pid \d+\) stalled") as caught:
        jobs.run(parse_spec(spec))
    assert "did not answer for 2 s" in caught.value.message
    assert jobs.run_folder().read_job().reason == "worker_died"


def test_an_asynchronous_job_uses_old_inverses_and_learns(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(jobs.folder)
    base = line_spec()["optimizer"]
    spec = line_spec(
        steps=40,
        optimizer=base | {"averaging": {"decay": 0.9, "start": 25}, "precondition_dtype": "auto"},
        staleness={"max_steps": 8},
        workers={"gradient": 2, "inverse": 2},
        evaluation={"every_steps": 20},
    )
    summary = train(spec, run_dir=jobs.folder / "run")
    assert summary.run_dir == str(jobs.folder / "run")
    assert summary.inverse_staleness_steps is not None
    assert summary.inverse_staleness_steps.mean > 0
    assert summary.inverse_staleness_steps.max <= 8
    assert summary.train is not None
    assert summary.initial_objective is not None
    assert summary.train["objective"] < summary.initial_objective / 2
    told = [e.message for e in jobs.run_folder().read_events() if e.kind == "precondition_dtype"]
    assert told == ["inverses are applied in float32: the parameters are torch.float64"]
    records = jobs.run_folder().read_metrics()
    evaluations = {record.step: record.evaluation for record in records if record.evaluation}
    assert set(evaluations) == {20, 40}
    assert evaluations[20].train_averaged is evaluations[20].test_averaged is None
    assert summary.train_averaged == evaluations[40].train_averaged
    assert summary.test_averaged == evaluations[40].test_averaged
    assert summary.train_averaged is not None
    assert summary.train_averaged.keys() == summary.train.keys()
    assert set(records[-1].phase_seconds) >= {"compute", "statistics", "reduce", "inversion"}


def test_more_workers_than_the_cluster_has_room_for(jobs: Jobs) -> None:
    with pytest.raises(InvalidSpecError, match="9 CPUs"):
        jobs.run(parse_spec(line_spec(workers={"gradient": 9})))


def test_user_code_that_ends_the_process_is_named_with_its_exit_code(jobs: Jobs) -> None:
    leaving = TASK.replace('raise LookupError("no such column")', "__import__('os')._exit(17)")
    (jobs.folder / "line.py").write_text(leaving)
    spec = line_spec(steps=1000, task_args={"breaks_after": 30}, faults={"max_restarts": 0})
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
