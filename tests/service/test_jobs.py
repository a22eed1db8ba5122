"""Requests, listings, reports and histories, in both databases."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import pytest

from kfac_dist.coordination.jobs.lifecycle import JobState, Trigger
from kfac_dist.errors import ConflictError, InvalidSpecError, NotFoundError, UsageError
from kfac_dist.runs.transfer.package import pack
from kfac_dist.service.control.launching import begin_attempt
from kfac_dist.service.job_records import Job, Report, ReportedState, StepValues
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.store import Store
from kfac_dist.service.store.job_rows import move
from kfac_dist.service.submission import package_path
from tests.service.requests import report, spec, steps, submit, told


@pytest.fixture
def jobs(store: Store, tmp_path: Path) -> Jobs:
    return Jobs(store, tmp_path)


def started(jobs: Jobs, **changes: object) -> Job:
    job = submit(jobs, **changes)
    with jobs.change(job.id) as (session, row):
        move(session, row, Trigger.ENQUEUE, time.time())
        begin_attempt(session, row, "secret", resumes=False, now=time.time())
    return jobs.get(job.id)


def test_a_new_job_has_every_default(jobs: Jobs) -> None:
    job = submit(jobs)
    assert jobs.get(job.id) == job
    assert (job.state, job.attempt, job.step, job.num_steps) == (JobState.PENDING, 0, 0, 20)
    assert job.spec["optimizer"]["name"] == "kfac"
    assert [event.kind for event in jobs.events(job.id)] == ["submitted"]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"spec": spec(stepss=1)}, InvalidSpecError, "Did you mean steps"),
        ({"spec": spec(task="own.py:Task")}, InvalidSpecError, "but none came with the job"),
        ({"spec": spec(task="../own.py:Task")}, InvalidSpecError, "inside the folder"),
        ({"spec": spec(), "package": b"x"}, InvalidSpecError, "is built in"),
        ({"spec": spec(task="own.py:Task"), "package": b"x"}, InvalidSpecError, "zip"),
        ({"spec": spec(), "priority": 1001}, UsageError, "-1000 and 1000"),
        ({"spec": spec(), "idempotency_key": "a b"}, UsageError, "without spaces"),
        ({"spec": spec(), "data_dir": "here"}, UsageError, "absolute"),
        ({"spec": spec(), "data_dir": "s3://me:pw@b/x"}, UsageError, "must have no user"),
    ],
)
def test_wrong_requests_are_refused(
    jobs: Jobs, options: dict[str, object], error: type, says: str
) -> None:
    with pytest.raises(error, match=says):
        jobs.create(owner="ada", **options)
    assert jobs.list() == ([], "")


def test_the_same_key_gives_the_same_job_also_at_the_same_time(jobs: Jobs) -> None:
    made: list[str] = []

    def create() -> None:
        made.append(jobs.create(spec(), owner="ada", idempotency_key="k").id)

    threads = [threading.Thread(target=create) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6
    assert len(set(made)) == 1
    assert jobs.create(spec(), owner="eve", idempotency_key="k").id != made[0]
    with pytest.raises(ConflictError, match=f"became job {made[0]}"):
        jobs.create(spec(steps=21), owner="ada", idempotency_key="k")


def test_user_code_is_kept_by_its_hash(jobs: Jobs, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "own.py").write_text("class Task: ...\n")
    package = pack(folder)
    job = jobs.create(spec(task="own.py:Task"), owner="ada", package=package)
    assert job.package is not None
    assert package_path(jobs.home, job.package).read_bytes() == package


def test_pages_cover_every_job_once_while_jobs_are_added(jobs: Jobs) -> None:
    made = [submit(jobs, name=f"job{number % 2}").id for number in range(7)]
    page, token = jobs.list(page_size=3)
    submit(jobs)
    seen = [job.id for job in page]
    while token:
        page, token = jobs.list(page_size=3, page_token=token)
        seen += [job.id for job in page]
    assert seen == made[::-1]
    assert [job.id for job in jobs.list(name="job1")[0]] == [made[5], made[3], made[1]]
    assert jobs.list(owner="eve") == ([], "")
    jobs.cancel(made[2])
    assert [job.id for job in jobs.list(states=[JobState.CANCELLED])[0]] == [made[2]]


@pytest.mark.parametrize("token", ["x", "!!", "W10", "WzEsMl0", "é", "bnVsbA"])
def test_a_made_up_page_token_is_refused(jobs: Jobs, token: str) -> None:
    with pytest.raises(UsageError, match=r"page_token: not a token that this server gave"):
        jobs.list(page_token=token)


def test_a_page_token_of_another_listing_is_refused(jobs: Jobs) -> None:
    for _ in range(3):
        submit(jobs)
    _, token = jobs.list(page_size=1)
    with pytest.raises(UsageError, match="other filters"):
        jobs.list(page_size=1, page_token=token, owner="ada")


@pytest.mark.parametrize("job_id", ["", "none", "a\x00b", "../x", "é", "a" * 300])
def test_a_job_that_does_not_exist(jobs: Jobs, job_id: str) -> None:
    with pytest.raises(NotFoundError, match="no such job"):
        jobs.get(job_id)


def test_requests_follow_the_rules_and_become_events(jobs: Jobs) -> None:
    job = submit(jobs)
    assert jobs.pause(job.id).state is JobState.PAUSED
    assert jobs.resume(job.id).state is JobState.QUEUED
    assert jobs.cancel(job.id).state is JobState.CANCELLED
    with pytest.raises(ConflictError, match="possible now: retry"):
        jobs.cancel(job.id)
    again = jobs.retry(job.id)
    assert (again.state, again.ended_at) == (JobState.QUEUED, None)
    kinds = [event.kind for event in jobs.events(job.id, after=1)]
    assert kinds == ["pause_requested", "resume_requested", "cancel_requested", "retry_requested"]
    assert [event.sequence for event in jobs.events(job.id, after=2, limit=2)] == [3, 4]


def test_a_report_that_comes_twice_is_stored_once(jobs: Jobs) -> None:
    job = started(jobs)
    full = report(job, state=JobState.RUNNING, events=[told(1), told(2)], steps=steps(1, 5))
    first = jobs.report(full)
    assert (first.order, first.events_known, first.steps_known) == ("none", 2, 5)
    revision = jobs.get(job.id).revision
    assert jobs.report(full) == first
    assert jobs.get(job.id).revision == revision
    assert [e.kind for e in jobs.events(job.id)].count("checkpoint") == 2
    (series,) = jobs.metrics(job.id, ["loss"])
    assert [point.value for point in series.points] == [1, 2, 3, 4, 5]
    assert jobs.get(job.id).state is JobState.RUNNING


def test_orders_travel_with_the_answer(jobs: Jobs) -> None:
    job = started(jobs)
    jobs.report(report(job, state=JobState.RUNNING))
    jobs.pause(job.id)
    assert jobs.report(report(job)).order == "pause"
    jobs.cancel(job.id)
    answer = jobs.report(report(job, state=JobState.DEGRADED))
    assert answer.order == "cancel"
    assert jobs.get(job.id).state is JobState.CANCELLING
    assert jobs.get(job.id).reason == "requested"


def test_repeated_steps_replace_the_old_ones(jobs: Jobs) -> None:
    job = started(jobs)
    jobs.report(report(job, steps=steps(1, 9)))
    again = told(1, "resumed", from_step=4)
    answer = jobs.report(report(job, events=[again], steps=steps(10, 12)))
    assert answer.steps_known == 4
    answer = jobs.report(report(job, steps=steps(3, 6, scale=10.0)))
    assert answer.steps_known == 6
    (series,) = jobs.metrics(job.id, ["loss"])
    assert [point.value for point in series.points] == [1, 2, 3, 4, 50, 60]
    assert jobs.attempts(job.id)[0].resumed_from_step == 4


def test_a_replaced_attempt_changes_nothing(jobs: Jobs) -> None:
    job = started(jobs)
    with jobs.change(job.id) as (session, row):
        move(session, row, Trigger.RESTART, time.time())
        begin_attempt(session, row, "other", resumes=True, now=time.time())
    assert jobs.get(job.id).state is JobState.RESUMING
    answer = jobs.report(report(job, state=JobState.FAILED, steps=steps(1, 3)))
    assert answer.fenced
    assert answer.steps_known == 0
    assert jobs.get(job.id).state is JobState.RESUMING
    assert not jobs.check_report_token(job.id, 2, "secret")
    assert jobs.check_report_token(job.id, 2, "other")
    assert not jobs.check_report_token(job.id, 3, "other")


def test_long_histories_are_thinned_out(jobs: Jobs) -> None:
    job = started(jobs)
    stale = {step: float(step == 500) for step in range(1, 1001)}
    values = [
        StepValues(
            step=step,
            time=float(step),
            values={
                "loss": math.nan if step < 11 else step,
                "inverse_staleness_steps.max": stale[step],
            },
        )
        for step in range(1, 1001)
    ]
    jobs.report(report(job, steps=values))
    loss, age = jobs.metrics(job.id, ["loss", "inverse_staleness_steps.max"], max_points=100)
    assert loss.sampled_every == 10
    assert [point.step for point in loss.points] == list(range(10, 1001, 10))
    assert math.isnan(loss.points[0].value)
    assert loss.points[1].value == pytest.approx(15.5)
    assert max(point.value for point in age.points) == 1.0
    (part,) = jobs.metrics(job.id, ["loss"], first_step=990, last_step=993)
    assert [point.value for point in part.points] == [990, 991, 992, 993]
    assert part.sampled_every == 1
    with pytest.raises(NotFoundError, match=r"no metric 'los'\. Did you mean loss\?"):
        jobs.metrics(job.id, ["los"])


def test_odd_text_from_a_users_process_is_kept(jobs: Jobs) -> None:
    job = started(jobs)
    odd = ReportedState(
        state=JobState.FAILED, step=0, reason="user_task", message="a\x00b \N{GRINNING FACE}"
    )
    jobs.report(report(job, events=[told(1, value=math.inf, text="\x00")]))
    jobs.report(Report(job=job.id, attempt=1, state=odd))
    (attempt,) = jobs.attempts(job.id)
    assert (attempt.state, attempt.message) == (JobState.FAILED, "a�b 😀")
    assert jobs.events(job.id)[-1].details == {"value": None, "text": "\x00"}


def test_listeners_are_called_once_a_change_is_durable(jobs: Jobs) -> None:
    job, other = submit(jobs), submit(jobs)
    seen: list[Job] = []
    unsubscribe = jobs.subscribe(lambda job_id: seen.append(jobs.get(job_id)))
    jobs.get(job.id)
    assert seen == []
    cancelled = jobs.cancel(job.id)
    assert seen == [cancelled]
    with pytest.raises(ConflictError):
        jobs.cancel(job.id)
    assert seen == [cancelled]
    paused = jobs.pause(other.id)
    assert seen == [cancelled, paused]
    unsubscribe()
    unsubscribe()
    jobs.resume(other.id)
    assert seen == [cancelled, paused]
