"""Reports from a run folder, whatever the server has received so far."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kfac_dist.config import parse_spec
from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import FirstFailure
from kfac_dist.runs import Event, RunFolder, RunIdentity
from kfac_dist.service.job_records import ReportAnswer
from kfac_dist.service.reporting.run_reader import MOST_IN_A_REPORT, DriverEnd, RunReader, write_end
from tests.service.requests import spec
from tests.service.scripted_driver import record


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    identity = RunIdentity(job="digits-1", attempt=3)
    with RunFolder.create(tmp_path / "run", parse_spec(spec()), identity) as made:
        yield made


def reader(folder: RunFolder, attempt: int = 3) -> RunReader:
    return RunReader(folder.path, "digits-1", attempt)


def known(events: int = 0, steps: int = 0) -> ReportAnswer:
    return ReportAnswer(order="none", events_known=events, steps_known=steps)


def append_steps(folder: RunFolder, first: int, last: int) -> None:
    for step in range(first, last + 1):
        folder.append_metrics(record(step, attempt=3))


def steps_of(run: RunReader) -> list[int]:
    return [step.step for step in run.read().steps]


def test_steps_and_events_are_reported_until_they_are_acknowledged(folder: RunFolder) -> None:
    run = reader(folder)
    append_steps(folder, 1, 3)
    folder.append_event(Event(kind="started", message="It trains.", step=0))
    report = run.read()
    assert report.state is not None
    assert report.state.state is JobState.STARTING
    assert [event.line for event in report.events] == [1]
    assert run.read() == report
    run.acknowledge(known(events=1, steps=2))
    assert run.read().state is None
    assert run.read().events == ()
    assert steps_of(run) == [3]
    run.acknowledge(known(events=1, steps=3))
    assert run.read().is_empty


def test_a_new_reader_resumes_where_the_server_says(folder: RunFolder) -> None:
    append_steps(folder, 1, 9)
    run = reader(folder)
    run.read()
    run.acknowledge(known(steps=7))
    assert steps_of(run) == [8, 9]
    run.acknowledge(known(steps=4))  # the server went back
    assert steps_of(run) == [5, 6, 7, 8, 9]


def test_steps_that_are_done_again_replace_those_before(folder: RunFolder) -> None:
    append_steps(folder, 1, 6)
    run = reader(folder)
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    folder.truncate_metrics_after(4)
    append_steps(folder, 5, 5)
    run.acknowledge(known(steps=4))
    assert steps_of(run) == [5]


def test_a_long_backlog_is_reported_in_parts(folder: RunFolder) -> None:
    append_steps(folder, 1, 2 * MOST_IN_A_REPORT + 1)
    run = reader(folder)
    seen: list[int] = []
    while steps := steps_of(run):
        assert run.has_more == (len(steps) == MOST_IN_A_REPORT)
        seen += steps
        run.acknowledge(known(steps=steps[-1]))
    assert seen == list(range(1, 2 * MOST_IN_A_REPORT + 2))


def test_the_state_is_that_of_this_attempt(folder: RunFolder) -> None:
    assert reader(folder, attempt=4).read().state is None
    folder.update_job(state="DEGRADED", step=5, reason="inverse_worker_died", message="one died")
    state = reader(folder).read().state
    assert state is not None
    assert (state.state, state.step, state.reason) == (JobState.DEGRADED, 5, "inverse_worker_died")


def test_the_drivers_own_end_takes_precedence_also_without_a_run(tmp_path: Path) -> None:
    failure = FirstFailure(role="gradient_worker", rank=1, time_seconds=5.0, log_tail="x")
    end = DriverEnd(
        attempt=3, state=JobState.FAILED, reason="user_task", message="m", first_failure=failure
    )
    write_end(tmp_path, end)
    state = RunReader(tmp_path, "digits-1", 3).read().state
    assert state is not None
    assert (state.state, state.reason, state.message) == (JobState.FAILED, "user_task", "m")
    assert state.first_failure is not None
    assert state.first_failure.log_tail == "x"
    assert RunReader(tmp_path, "digits-1", 4).read().is_empty
