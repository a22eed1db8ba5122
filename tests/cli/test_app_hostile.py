"""A job whose texts try to steer the terminal of whoever looks at it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfac_dist.coordination.jobs.lifecycle import JobState, Trigger
from kfac_dist.errors import FirstFailure
from kfac_dist.runs import Event
from kfac_dist.service.control.launching import begin_attempt
from kfac_dist.service.job_records import Report, ReportedEvent, ReportedState, Role
from kfac_dist.service.store.job_rows import move
from tests.cli.conftest import KfacDist
from tests.service.requests import submit
from tests.service.serving import Serving, serving

CLEAR = "\x1b[2J\x1b]0;owned\x07\x9b1m\u202e"
MESSAGE = f"{CLEAR}[bold]told[/bold]\nerror: another\n" + "long " * 2000
TRACEBACK = 'Traceback (most recent call last):\n  File "task.py", line 3\nValueError: no'


@pytest.fixture
def server(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    with serving(tmp_path / "server") as running:
        monkeypatch.setenv("KFAC_DIST_SERVER", running.address)
        monkeypatch.setenv("KFAC_DIST_TOKEN", running.token("ada", Role.SUBMITTER))
        yield running


@pytest.fixture
def job(server: Serving) -> str:
    """A failed job after a restart, with hostile texts wherever a task can put one."""
    job = submit(server.jobs).id
    with server.jobs.change(job) as (session, row):
        move(session, row, Trigger.ENQUEUE, time.time())
        begin_attempt(session, row, "secret", resumes=False, now=time.time())
    event = Event(kind="x", message=MESSAGE, step=3, time=20.0, severity="error", attempt=1)
    line = json.dumps({"event": f"{CLEAR}failed", "level": "error", "exception": TRACEBACK})
    failure = FirstFailure(role="gradient_worker", rank=1, time_seconds=10.0, log_tail=line)
    state = ReportedState(
        state=JobState.FAILED, step=3, reason="user_task", message=MESSAGE, first_failure=failure
    )
    told = [ReportedEvent(line=1, event=event)]
    server.jobs.report(Report(job=job, attempt=1, state=state, events=told))
    with server.jobs.change(job) as (session, row):
        move(session, row, Trigger.FAIL, time.time(), reason="user_task", message=MESSAGE)
    logs = server.jobs.log_dir(job)
    logs.mkdir(parents=True)
    (logs / "driver-0.log").write_text(f"{line}\na\tb{CLEAR}\n{'[' * 100_000}\n")
    return job


@pytest.mark.parametrize(
    "command",
    [
        *(["list", *form] for form in ([], ["-o", "json"], ["-o", "yaml"])),
        *(["describe", "JOB", *form] for form in ([], ["-o", "json"], ["-o", "yaml"])),
        *(["explain", "JOB", *form] for form in ([], ["-o", "json"], ["-o", "yaml"])),
        *(["logs", "JOB", *form] for form in ([], ["-o", "json"], ["-o", "yaml"])),
        *(["watch", "JOB", *form] for form in ([], ["-o", "json"], ["-o", "yaml"])),
        ["cancel", "JOB"],
        ["describe", CLEAR],
        ["list", "--server", CLEAR],
        ["validate", f"{CLEAR}.yaml"],
    ],
)
def test_no_command_passes_a_control_character_on(
    kfac_dist: KfacDist, job: str, command: list[str]
) -> None:
    done = kfac_dist(*(job if word == "JOB" else word for word in command))
    assert done.code != 70, done.err
    assert not set(CLEAR) - set("[2J]0;owned1m") & set(done.out + done.err)
    assert done.out + done.err != ""


def test_list_has_one_line_for_a_job(server: Serving, kfac_dist: KfacDist, job: str) -> None:
    submit(server.jobs)
    assert len(kfac_dist("list").out.splitlines()) == 3
    assert "[bold]told[/bold]" in kfac_dist("list").out


def test_list_says_how_many_it_leaves_out(server: Serving, kfac_dist: KfacDist) -> None:
    for _ in range(3):
        submit(server.jobs)
    done = kfac_dist("list", "--limit", 2)
    assert done.err == "2 of 3 shown; --limit N or --all shows more\n"
    assert len(done.out.splitlines()) == 3
    for options in (["--limit", "3"], ["--all"], ["--limit", "2", "--all"], ["--limit", "9"]):
        done = kfac_dist("list", *options)
        assert (len(done.out.splitlines()), done.err) == (4, "")
    facts = json.loads(kfac_dist("list", "--limit", 2, "-o", "json").out)
    assert (len(facts["jobs"]), facts["total"]) == (2, 3)
    assert json.loads(kfac_dist("list", "--name", "no", "-o", "json").out)["total"] == 0


def test_explain_shows_attempts_and_the_lines_of_a_traceback(
    server: Serving, kfac_dist: KfacDist, job: str
) -> None:
    server.jobs.retry(job)
    with server.jobs.change(job) as (session, row):
        begin_attempt(session, row, "secret", resumes=True, now=time.time())
    lines = kfac_dist("explain", job).out.splitlines()
    first = next(line for line in lines if line.startswith("  1 FAILED"))
    assert "user_task: " in first
    assert any(line.startswith("  2 RESUMING") for line in lines)
    assert not any(line.startswith("error: another") for line in lines)
    facts = json.loads(kfac_dist("explain", job, "-o", "json").out)
    assert [attempt["number"] for attempt in facts["attempts"]] == [1, 2]
    assert facts["attempts"][0]["ended_at"].endswith("Z")


def test_a_traceback_has_a_line_for_each_of_its_lines(kfac_dist: KfacDist, job: str) -> None:
    for verb in ("explain", "logs"):
        shown = [line.strip(" |") for line in kfac_dist(verb, job).out.splitlines()]
        begin = shown.index("Traceback (most recent call last):")
        assert shown[begin + 1 : begin + 3] == ['File "task.py", line 3', "ValueError: no"]


def test_logs_keep_tabs(kfac_dist: KfacDist, job: str) -> None:
    assert "driver-0 a\tb\\u001b[2J" in kfac_dist("logs", job).out
