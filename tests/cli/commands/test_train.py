"""`train` around a runner that only pretends: what is handed on, and what is written where."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import pytest

from kfac_dist.config import JobSpec
from kfac_dist.errors import WorkerDiedError
from kfac_dist.runs import Event, JobSummary, RunFolder, StepRecord, WorkerCounts
from tests.cli.conftest import KfacDist
from tests.workers.whole_jobs.scraping import scrape

Runner = Callable[..., JobSummary]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Callable[[Runner], None]:
    """Puts a function in the place of `workers.driver.launch.run_job`."""

    def install(run_job: Runner) -> None:
        launch = ModuleType("workers.driver.launch")
        vars(launch)["run_job"] = run_job
        monkeypatch.setitem(sys.modules, "workers.driver.launch", launch)

    return install


def _summary(spec: JobSpec, folder: RunFolder, **changes: Any) -> JobSummary:
    values: dict[str, Any] = {
        "job": folder.read_job().job,
        "state": "SUCCEEDED",
        "step": spec.steps,
        "train": {"objective": 60.5, "squared_error": float("nan")},
        "test": {"objective": 61.5},
        "wall_seconds": 2.0,
        "steps_per_second": 2.5,
        "inverse_staleness_steps": {"mean": 3.0, "max": 7},
        "workers": WorkerCounts(gradient=1, inverse=1, parameter_server=1),
        "run_dir": str(folder.path),
    }
    return JobSummary.model_validate(values | changes)


def _record(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        time=1000.0 + step / 4,
        loss=60.0,
        objective=60.25,
        num_cases=100,
        update_norm=0.1,
        step_seconds=0.25,
        parameter_version=step,
        damping=30.0,
    )


def _succeeds(spec: JobSpec, **options: Any) -> JobSummary:
    with RunFolder.create(options["run_dir"], spec) as folder:
        for step in range(1, spec.steps + 1):
            options["on_record"](_record(step))
        options["on_event"](Event(kind="started", message="fine", step=1))
        options["on_event"](Event(kind="x", message="mind this", step=2, severity="warning"))
        folder.update_job(state="SUCCEEDED", step=spec.steps)
        return _summary(spec, folder)


def test_the_summary_is_one_json_object_on_one_line(
    kfac_dist: KfacDist, runner: Callable[[Runner], None], spec: Path, home: Path
) -> None:
    runner(_succeeds)
    done = kfac_dist("train", spec, "-o", "json")
    assert done.code == 0
    assert done.err == ""  # no terminal, so no progress
    (line,) = done.out.splitlines()
    summary = json.loads(line)
    keys = "job state step train test wall_seconds steps_per_second inverse_staleness_steps"
    assert {*keys.split(), "workers", "run_dir"} <= summary.keys()
    assert summary["train"]["squared_error"] is None
    assert summary["inverse_staleness_steps"] == {"mean": 3.0, "max": 7.0}
    assert summary["run_dir"] == str(home / "runs" / "digits")


def test_a_table_comes_with_plain_progress_on_stderr(
    kfac_dist: KfacDist, runner: Callable[[Runner], None], spec: Path
) -> None:
    runner(_succeeds)
    done = kfac_dist("train", spec)
    assert "train.objective" in done.out
    lines = done.err.splitlines()
    assert lines[0] == "step 1/5  objective 60.25 · damping 30"
    assert lines[1] == "step 5/5  objective 60.25 · 4 steps/s · damping 30"
    assert lines[2] == "warning: step 2: mind this"


def test_options_reach_the_runner(
    kfac_dist: KfacDist,
    runner: Callable[[Runner], None],
    spec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    def remember(job: JobSpec, **options: Any) -> JobSummary:
        seen.update(options, steps=job.steps)
        return _succeeds(job, **options)

    runner(remember)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KFAC_DIST_DATA", str(tmp_path / "from-environment"))
    assert kfac_dist("train", "digits.yaml", "--run-dir", "here", "--set", "steps=9").code == 0
    assert seen["run_dir"] == tmp_path / "here"
    assert seen["base_dir"] == tmp_path
    assert seen["data_dir"] == tmp_path / "from-environment"
    assert (seen["resume"], seen["steps"]) == (False, 9)
    done = kfac_dist("train", spec, "--run-dir", "there", "--data-dir", "data")
    assert done.code == 0
    assert seen["data_dir"] == tmp_path / "data"


def test_metrics_are_served_while_the_runner_runs_and_stderr_says_where(
    kfac_dist: KfacDist, runner: Callable[[Runner], None], spec: Path
) -> None:
    served: list[str] = []

    def look(job: JobSpec, **options: Any) -> JobSummary:
        served.append(options["metrics"].url)
        assert scrape(served[0]) == {}
        return _succeeds(job, **options)

    runner(look)
    done = kfac_dist("train", spec, "--metrics-port", "0", "-o", "json")
    assert done.code == 0
    assert done.err == f"metrics at {served[0]}\n"
    assert len(done.out.splitlines()) == 1
    with pytest.raises(URLError):
        scrape(served[0])


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_port_in_use_is_one_message_and_leaves_no_run(
    kfac_dist: KfacDist,
    runner: Callable[[Runner], None],
    spec: Path,
    home: Path,
    options: list[str],
) -> None:
    runner(_succeeds)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = kfac_dist("train", spec, "--metrics-port", port, *options)
    assert (done.code, done.out) == (9, "")
    assert done.err == (
        f"error: metrics port: {port} on 127.0.0.1 is in use; name another, or 0 for a free one\n"
    )
    assert not (home / "runs").exists()


def test_an_occupied_folder_is_refused_before_anything_is_loaded(
    kfac_dist: KfacDist, runner: Callable[[Runner], None], spec: Path
) -> None:
    runner(_succeeds)
    assert kfac_dist("train", spec).code == 0
    monkey = ModuleType("workers.driver.launch")  # would fail, were it asked
    sys.modules["workers.driver.launch"] = monkey
    done = kfac_dist("train", spec, "-o", "json")
    assert done.code == 9
    message = json.loads(done.err)["error"]["message"]
    for part in ("SUCCEEDED", "step 5", "--resume", "--run-dir"):
        assert part in message


def test_a_failed_job_prints_its_summary_and_exits_with_1(
    kfac_dist: KfacDist, runner: Callable[[Runner], None], spec: Path
) -> None:
    def fail(job: JobSpec, **options: Any) -> JobSummary:
        error = WorkerDiedError("parameter_server 0 died (SIGKILL) in step 3")
        with RunFolder.create(options["run_dir"], job) as folder:
            ended = _summary(
                job, folder, state="FAILED", reason=error.reason, message=error.message, step=3
            )
            folder.write_summary(ended)
        raise error

    runner(fail)
    done = kfac_dist("train", spec, "-o", "json")
    assert done.code == 1
    summary = json.loads(done.out)
    assert (summary["state"], summary["reason"], summary["step"]) == ("FAILED", "worker_died", 3)
    assert json.loads(done.err)["error"]["message"] == summary["message"]


def test_a_job_that_fails_before_it_begins_has_no_summary(
    kfac_dist: KfacDist, runner: Callable[[Runner], None], spec: Path
) -> None:
    def fail(job: JobSpec, **options: Any) -> JobSummary:
        raise WorkerDiedError("Ray did not start")

    runner(fail)
    done = kfac_dist("train", spec, "-o", "json")
    assert (done.code, done.out) == (1, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_and_130(
    kfac_dist: KfacDist, runner: Callable[[Runner], None], spec: Path, number: signal.Signals
) -> None:
    def wait(job: JobSpec, **options: Any) -> JobSummary:
        os.kill(os.getpid(), number)
        signal.pause()
        raise AssertionError("the signal should have come")

    runner(wait)
    before = signal.getsignal(signal.SIGTERM)
    done = kfac_dist("train", spec)
    assert done.code == 130
    assert done.out == ""
    assert done.err.startswith("interrupted; the run is in ")
    assert done.err.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is before
