"""The controller with real processes, a real store and real run folders, without Ray and torch."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kfac_dist.coordination.jobs.lifecycle import ENDED, JobState, Trigger
from kfac_dist.coordination.jobs.runner import AttemptKey
from kfac_dist.coordination.jobs.supervision import WaitLimits
from kfac_dist.service.access.local import LocalServer, write_server
from kfac_dist.service.control.controller import Controller
from kfac_dist.service.control.launching import begin_attempt
from kfac_dist.service.job_records import Job
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.store import open_store
from kfac_dist.service.store.job_rows import move
from tests.service.requests import spec
from tests.service.serving import Serving, serving
from tests.service.subprocess_runner import SubprocessRunner
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(400)

LIMITS = WaitLimits(
    start_seconds=120.0,
    cancel_seconds=3.0,
    pause_seconds=10.0,
    stop_seconds=1.0,
    exit_seconds=5.0,
    silence_seconds=30.0,
    doubt_seconds=1.0,
    first_rest_seconds=0.5,
    longest_rest_seconds=2.0,
)


class Plant:
    """Jobs and a controller that runs them as real processes."""

    def __init__(self, home: Path, jobs: Jobs, runner: SubprocessRunner) -> None:
        self.home = home
        self.jobs = jobs
        self.runner = runner
        self.limits = LIMITS
        self.controller = Controller(jobs, runner, LIMITS)

    def submit(self, *, priority: int = 0, **script: Any) -> Job:
        steps = script.pop("steps", 30)
        faults = {"max_restarts": script.pop("max_restarts", 1)}
        if "max_preemptions" in script:
            faults["max_preemptions"] = script.pop("max_preemptions")
        workers = {"gradient": script.pop("gradient", 1)}
        made = spec(task_args=script, steps=steps, faults=faults, workers=workers)
        return self.jobs.create(made, owner="ada", priority=priority)

    def wait(self, job: Job, state: JobState) -> Job:
        def arrived() -> bool:
            now = self.jobs.get(job.id)
            assert now.state is state or now.state not in ENDED, now
            return now.state is state

        wait_until(arrived, f"{state} of {job.id}", seconds=150.0)
        return self.jobs.get(job.id)

    def wait_for_step(self, job: Job, step: int) -> None:
        wait_until(lambda: self.jobs.get(job.id).step >= step, f"step {step}", seconds=150.0)

    def ran(self, job: Job) -> list[tuple[int, int]]:
        """(attempt, step) of all steps that were taken."""
        lines = (Path(job.run_dir) / "ran").read_text().splitlines()
        return [(int(attempt), int(step)) for attempt, step in map(str.split, lines)]

    def losses(self, job: Job) -> list[float]:
        (series,) = self.jobs.metrics(job.id, ["loss"])
        return [point.value for point in series.points]

    def kinds(self, job: Job) -> list[str]:
        return [event.kind for event in self.jobs.events(job.id)]


@contextmanager
def announced(home: Path) -> Iterator[Serving]:
    """Serve inside the block, at an address that drivers find."""
    with serving(home) as server:
        write_server(home, LocalServer(address=server.address, pid=os.getpid(), tls_ca=None))
        yield server


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    """A plant without a server: the controller reads the run folders itself."""
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    runner = SubprocessRunner()
    made = Plant(tmp_path, Jobs(store, tmp_path), runner)
    made.controller.start()
    yield made
    made.controller.stop()
    runner.close()
    store.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Plant]:
    """A plant with a server, to which drivers report."""
    runner = SubprocessRunner()
    with announced(tmp_path / "home") as server:
        made = Plant(server.jobs.home, server.jobs, runner)
        made.controller.start()
        yield made
        made.controller.stop()
        runner.close()


def test_jobs_run_to_their_end_with_a_complete_history(served: Plant) -> None:
    first, second = served.submit(), served.submit(gradient=2)
    for job in (first, second):
        ended = served.wait(job, JobState.SUCCEEDED)
        assert (ended.step, ended.attempt, ended.reason) == (30, 1, None)
        assert served.losses(job) == list(range(1, 31))
        (attempt,) = served.jobs.attempts(job.id)
        assert attempt.state is JobState.SUCCEEDED
        assert attempt.heard_at is not None
    assert served.kinds(first) == ["submitted", "attempt_started", "attempt_ended"]


def test_without_reports_the_run_folder_is_read(plant: Plant) -> None:
    job = plant.submit()
    ended = plant.wait(job, JobState.SUCCEEDED)
    assert ended.step == 30
    assert plant.losses(job) == list(range(1, 31))
    assert plant.jobs.attempts(job.id)[0].heard_at is None


def test_room_and_priority_decide_who_runs(plant: Plant) -> None:
    plant.runner.num_cpus = 1
    first = plant.submit(seconds=0.2, steps=15)
    plant.wait_for_step(first, 1)
    low, high = plant.submit(steps=2), plant.submit(steps=2, priority=7)
    wait_until(lambda: plant.jobs.get(low.id).reason == "waiting_for_turn", "the verdict")
    assert plant.jobs.get(high.id).message == "needs 1 CPU, 1 of the cluster's 1 are in use"
    plant.wait(low, JobState.SUCCEEDED)
    assert [key.job for key in plant.runner.submitted] == [first.id, high.id, low.id]


def test_a_job_that_can_never_run_says_what_is_missing(plant: Plant) -> None:
    job = plant.submit(gradient=9)
    wait_until(lambda: plant.jobs.get(job.id).reason is not None, "the verdict")
    queued = plant.jobs.get(job.id)
    assert (queued.state, queued.reason) == (JobState.QUEUED, "insufficient_resources")
    assert queued.message == "needs 9 CPUs, the cluster has 4"
    assert plant.jobs.cancel(job.id).state is JobState.CANCELLED


def test_a_cancelled_job_leaves_no_process(served: Plant) -> None:
    job = served.submit(seconds=0.2, steps=1000)
    served.wait_for_step(job, 2)
    process = served.runner.processes[AttemptKey(job.id, 1)]
    assert served.jobs.cancel(job.id).state is JobState.CANCELLING
    ended = served.wait(job, JobState.CANCELLED)
    assert process.poll() == 0  # the driver ended by itself
    assert ended.message == "cancelled by request; nothing of it is left"


def test_a_driver_that_does_not_obey_is_killed(served: Plant) -> None:
    job = served.submit(seconds=0.2, steps=1000, end="ignore")
    served.wait_for_step(job, 2)
    served.jobs.cancel(job.id)
    served.wait(job, JobState.CANCELLED)
    assert served.runner.processes[AttemptKey(job.id, 1)].poll() == -9


def test_cancel_now_kills_at_once(served: Plant) -> None:
    job = served.submit(seconds=0.2, steps=1000)
    served.wait_for_step(job, 2)
    served.jobs.cancel(job.id, now=True)
    served.wait(job, JobState.CANCELLED)
    assert served.runner.processes[AttemptKey(job.id, 1)].poll() in (-9, 0)


def test_a_paused_job_resumes_where_it_stopped(served: Plant) -> None:
    job = served.submit(seconds=0.1, steps=40)
    served.wait_for_step(job, 3)
    assert served.jobs.pause(job.id).state is JobState.PAUSING
    paused = served.wait(job, JobState.PAUSED)
    assert 3 <= paused.step < 40
    assert served.jobs.checkpoints(job.id)[0].step == paused.step
    served.jobs.resume(job.id)
    ended = served.wait(job, JobState.SUCCEEDED)
    assert (ended.attempt, ended.num_restarts) == (2, 0)
    assert served.losses(job) == list(range(1, 41))
    first, second = served.jobs.attempts(job.id)
    assert (first.state, second.resumed_from_step) == (JobState.PAUSED, paused.step)
    assert [step for _, step in served.ran(job)] == list(range(1, 41))


def test_a_killed_driver_is_restarted_up_to_max_restarts_times(plant: Plant) -> None:
    job = plant.submit(end="die", end_at=9, max_restarts=2)
    failed = plant.wait(job, JobState.FAILED)
    assert (failed.reason, failed.attempt, failed.num_restarts) == ("driver_died", 3, 2)
    assert failed.message is not None
    assert "restarted 2 times, faults.max_restarts is 2" in failed.message
    assert [step for _, step in plant.ran(job)] == list(range(1, 9))
    plant.jobs.retry(job.id)
    wait_until(lambda: plant.jobs.get(job.id).attempt == 4, "the retry")


def test_the_same_death_at_one_step_rests_longer_each_time_and_ends_early(plant: Plant) -> None:
    job = plant.submit(end="die", end_at=5, max_restarts=50)
    wait_until(lambda: plant.jobs.get(job.id).reason == "waiting_to_restart", "the rest")
    message = str(plant.jobs.get(job.id).message)
    assert re.match(r"attempt 2 starts at 20\d\d-.*Z, 0\.5 s after: the driver ended", message)
    failed = plant.wait(job, JobState.FAILED)
    assert (failed.reason, failed.attempt, failed.num_restarts) == ("driver_died", 3, 2)
    assert "failed 3 times in a row at step 4, without progress" in str(failed.message)
    first, second, third = plant.jobs.attempts(job.id)
    assert second.started_at - (first.ended_at or 0.0) >= 0.5
    assert third.started_at - (second.ended_at or 0.0) >= 2.0


def test_a_resting_job_delays_no_other_and_can_be_started_at_once(plant: Plant) -> None:
    plant.controller.stop()
    limits = replace(LIMITS, first_rest_seconds=1000.0, longest_rest_seconds=1000.0)
    plant.controller = Controller(plant.jobs, plant.runner, limits)
    plant.controller.start()
    job = plant.submit(end="die", end_at=5, gradient=4, max_restarts=50)
    wait_until(lambda: plant.jobs.get(job.id).reason == "waiting_to_restart", "the rest")
    plant.wait(plant.submit(steps=2), JobState.SUCCEEDED)
    plant.jobs.pause(job.id)
    plant.jobs.resume(job.id)
    wait_until(lambda: plant.jobs.get(job.id).attempt == 2, "the second attempt")


def test_a_job_is_restarted_after_the_death_of_a_worker(served: Plant) -> None:
    job = served.submit(end="worker_dies", end_at=5, max_restarts=1)
    failed = served.wait(job, JobState.FAILED)
    assert (failed.reason, failed.attempt) == ("worker_died", 2)


def test_a_job_is_not_restarted_after_an_error_of_the_user(served: Plant) -> None:
    job = served.submit(end="fail", end_at=5)
    failed = served.wait(job, JobState.FAILED)
    assert (failed.reason, failed.attempt) == ("user_task", 1)
    assert failed.first_failure is not None
    assert (failed.first_failure.role, failed.first_failure.rank) == ("gradient_worker", 1)


def test_an_attempt_that_the_cluster_never_starts_fails_in_time(plant: Plant) -> None:
    plant.runner.keeps_pending = True
    plant.controller.stop()
    limits = WaitLimits(start_seconds=1.0)
    plant.controller = Controller(plant.jobs, plant.runner, limits)
    plant.controller.start()
    failed = plant.wait(plant.submit(), JobState.FAILED)
    assert failed.reason == "start_timed_out"
    assert "did not report within 1 s" in str(failed.message)


def test_an_attempt_that_a_dead_server_did_not_submit_is_submitted_later(plant: Plant) -> None:
    plant.controller.stop()
    job = plant.submit()
    with plant.jobs.change(job.id) as (session, row):
        move(session, row, Trigger.ENQUEUE, time.time())
        begin_attempt(session, row, "lost with the server", resumes=False, now=time.time())
    assert plant.runner.submitted == []
    plant.controller = Controller(plant.jobs, plant.runner, LIMITS)
    plant.controller.start()
    assert plant.wait(job, JobState.SUCCEEDED).attempt == 1
    assert plant.runner.submitted == [AttemptKey(job.id, 1)]


def test_a_cluster_that_forgets_does_not_end_a_job_that_reports(served: Plant) -> None:
    job = served.submit(seconds=0.1, steps=40)
    served.wait_for_step(job, 3)
    served.runner.forgets = True
    ended = served.wait(job, JobState.SUCCEEDED)
    assert ended.attempt == 1
    assert served.ran(job) == [(1, step) for step in range(1, 41)]


def test_jobs_wait_for_an_unreachable_cluster_and_say_so(plant: Plant) -> None:
    plant.runner.is_away = True
    job = plant.submit()
    wait_until(lambda: plant.jobs.get(job.id).reason == "cluster_unreachable", "the verdict")
    assert plant.jobs.get(job.id).message == "the cluster is away"
    plant.runner.is_away = False
    plant.wait(job, JobState.SUCCEEDED)


def test_a_job_that_is_not_heard_from_says_so_and_those_in_the_queue_too(plant: Plant) -> None:
    plant.controller.stop()
    limits = replace(LIMITS, silence_seconds=1.0)
    plant.controller = Controller(plant.jobs, plant.runner, limits)
    plant.controller.start()
    first = plant.submit(seconds=0.2, steps=1000)
    plant.wait_for_step(first, 1)
    wait_until(lambda: plant.jobs.get(first.id).reason == "driver_silent", "the silence")
    assert "the cluster says that it runs" in str(plant.jobs.get(first.id).message)
    plant.runner.is_away = True
    second = plant.submit()
    both = {first.id, second.id}
    wait_until(
        lambda: {plant.jobs.get(job).reason for job in both} == {"cluster_unreachable"}, "both"
    )
    assert plant.jobs.get(first.id).state is JobState.RUNNING
    message = str(plant.jobs.get(first.id).message)
    assert message.startswith("the driver has not reported since 2")
    assert message.endswith("Z, when the attempt began; the cluster is away")
    assert plant.jobs.get(second.id).message == "the cluster is away"
    step = plant.jobs.get(first.id).step
    plant.wait_for_step(first, step + 3)  # the run folder is read meanwhile
    plant.jobs.cancel(first.id)
    wait_until(lambda: plant.jobs.get(first.id).reason == "requested", "the request as the reason")
    plant.runner.is_away = False
    plant.wait(second, JobState.SUCCEEDED)
    kinds = plant.kinds(first)
    assert "driver_silent" in kinds
    assert kinds.count("cluster_unreachable") == 1  # not once for each pass


def test_a_job_that_is_heard_again_has_no_reason_any_more(served: Plant) -> None:
    served.controller.stop()
    job = served.submit(seconds=0.1, steps=1000)
    served.controller = Controller(served.jobs, served.runner, LIMITS)
    served.controller.start()
    served.wait_for_step(job, 1)
    with served.jobs.change(job.id) as (_, row):
        row.reason, row.message = "driver_silent", "the driver has not reported since long ago"
    wait_until(lambda: served.jobs.get(job.id).reason is None, "no reason")
    assert served.jobs.get(job.id).state is JobState.RUNNING
    served.jobs.cancel(job.id, now=True)
    served.wait(job, JobState.CANCELLED)


def test_a_job_that_finds_no_room_any_more_waits_in_the_queue(plant: Plant) -> None:
    job = plant.submit(end="no_room", end_at=3, max_restarts=0, gradient=2)
    wait_until(lambda: len(plant.jobs.attempts(job.id)) == 2, "the second attempt")
    plant.runner.num_cpus = 1
    wait_until(lambda: plant.jobs.get(job.id).reason == "insufficient_resources", "the queue")
    queued = plant.jobs.get(job.id)
    assert (queued.state, queued.num_restarts) == (JobState.QUEUED, 0)
    assert queued.message == "needs 2 CPUs, the cluster has 1"
    ends = {(attempt.state, attempt.reason) for attempt in plant.jobs.attempts(job.id)}
    assert ends == {(JobState.FAILED, "no_room")}


def test_preemptions_are_counted_apart_from_restarts(plant: Plant) -> None:
    job = plant.submit(end="preempted", end_at=3, max_restarts=0, max_preemptions=1)
    wait_until(lambda: plant.jobs.get(job.id).state is JobState.FAILED, "the end")
    failed = plant.jobs.get(job.id)
    assert (failed.reason, failed.num_restarts, failed.attempt) == ("preempted", 0, 2)
    assert failed.message is not None
    assert failed.message.endswith("preempted 2 times, faults.max_preemptions is 1")


def test_an_attempt_that_should_not_run_is_killed(plant: Plant) -> None:
    job = plant.submit(seconds=0.2, steps=1000)
    wait_until(lambda: AttemptKey(job.id, 1) in plant.runner.processes, "the driver")
    plant.controller.stop()
    with plant.jobs.change(job.id) as (_, row):
        row.state = JobState.CANCELLED
    plant.controller = Controller(plant.jobs, plant.runner, LIMITS)
    plant.controller.start()
    process = plant.runner.processes[AttemptKey(job.id, 1)]
    wait_until(lambda: process.poll() is not None, "the end of the stray")


def test_a_job_continues_while_no_server_runs(tmp_path: Path) -> None:
    home, runner = tmp_path / "home", SubprocessRunner()
    with announced(home) as server:
        plant = Plant(home, server.jobs, runner)
        plant.controller.start()
        job = plant.submit(seconds=0.1, steps=60)
        plant.wait_for_step(job, 3)
        plant.controller.stop()
    known = (Path(job.run_dir) / "ran").read_text().count("\n")
    wait_until(lambda: len(plant.ran(job)) > known + 5, "steps without a server")
    with announced(home) as server:
        plant = Plant(home, server.jobs, runner)
        plant.controller.start()
        ended = plant.wait(job, JobState.SUCCEEDED)
        assert ended.attempt == 1
        assert plant.losses(job) == list(range(1, 61))
        assert plant.ran(job) == [(1, step) for step in range(1, 61)]
        plant.controller.stop()
    runner.close()
