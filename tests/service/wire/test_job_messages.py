"""Records are the same after they have travelled as messages."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import FirstFailure
from kfac_dist.service.job_records import (
    Attempt,
    CheckpointFacts,
    Job,
    JobEvent,
    LogLine,
    MetricPoint,
    MetricSeries,
)
from kfac_dist.service.wire import job_messages as wire
from kfac_dist.service.wire import values as wire_values
from kfac_dist.v1 import job_pb2

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
MAYBE_TEXT = st.none() | TEXT
# Whole microseconds, which is what a timestamp keeps.
TIME = st.integers(0, 4_000_000_000_000_000).map(lambda number: number / 1e6)
COUNT = st.integers(0, 2**31 - 1)
STEP = st.integers(0, 2**53)
VALUES = st.dictionaries(TEXT, st.integers(-9, 9) | TEXT | st.booleans(), max_size=3)
STATE = st.sampled_from(JobState)

failures = st.builds(FirstFailure, role=TEXT, rank=COUNT, time_seconds=TIME, log_tail=TEXT)
jobs = st.builds(
    Job,
    id=TEXT,
    name=TEXT,
    owner=TEXT,
    state=STATE,
    reason=MAYBE_TEXT,
    message=MAYBE_TEXT,
    first_failure=st.none() | failures,
    attempt=COUNT,
    num_restarts=COUNT,
    priority=st.integers(-1000, 1000),
    spec=VALUES,
    step=STEP,
    num_steps=STEP,
    created_at=TIME,
    updated_at=TIME,
    started_at=st.none() | TIME,
    ended_at=st.none() | TIME,
    run_dir=TEXT,
    data_dir=MAYBE_TEXT,
    package=MAYBE_TEXT,
    summary=st.none() | VALUES,
    revision=STEP,
    idempotency_key=st.none(),
)
attempts = st.builds(
    Attempt,
    job=TEXT,
    number=COUNT,
    state=STATE,
    reason=MAYBE_TEXT,
    message=MAYBE_TEXT,
    started_at=TIME,
    ended_at=st.none() | TIME,
    heard_at=st.none() | TIME,
    resumed_from_step=st.none() | STEP,
)
events = st.builds(
    JobEvent,
    job=TEXT,
    sequence=STEP,
    kind=TEXT,
    message=TEXT,
    step=STEP,
    time=TIME,
    severity=st.sampled_from(["info", "warning", "error"]),
    role=MAYBE_TEXT,
    rank=st.none() | COUNT,
    attempt=COUNT,
    details=VALUES,
)
points = st.builds(MetricPoint, step=STEP, time=TIME, value=st.floats(allow_nan=False))
series = st.builds(MetricSeries, name=TEXT, points=st.lists(points, max_size=5), sampled_every=STEP)
lines = st.builds(LogLine, role=TEXT, rank=COUNT, attempt=COUNT, text=TEXT, time=st.none() | TIME)
checkpoints = st.builds(CheckpointFacts, step=STEP, path=TEXT, size_bytes=STEP, created_at=TIME)


@given(jobs)
def test_jobs(job: Job) -> None:
    sent = job_pb2.Job.FromString(wire.to_job(job).SerializeToString())
    assert wire.from_job(sent) == job


@given(jobs)
def test_a_listed_job_lacks_its_large_parts(job: Job) -> None:
    listed = wire.from_job(wire.to_job(job, whole=False))
    assert (listed.spec, listed.summary) == ({}, None)
    assert (listed.id, listed.state, listed.message) == (job.id, job.state, job.message)


@given(attempts)
def test_attempts(attempt: Attempt) -> None:
    assert wire.from_attempt(wire.to_attempt(attempt)) == attempt


@given(events)
def test_events(event: JobEvent) -> None:
    assert wire.from_event(wire.to_event(event)) == event


@given(series)
def test_series(metric: MetricSeries) -> None:
    assert wire.from_series(wire.to_series(metric)) == metric


@given(lines)
def test_log_lines(line: LogLine) -> None:
    assert wire.from_log_line(wire.to_log_line(line)) == line


@given(checkpoints)
def test_checkpoints(checkpoint: CheckpointFacts) -> None:
    assert wire.from_checkpoint(wire.to_checkpoint(checkpoint)) == checkpoint


def test_nan_stays_nan() -> None:
    point = MetricPoint(step=1, time=1.0, value=math.nan)
    sent = wire.to_series(MetricSeries(name="loss", points=[point], sampled_every=1))
    assert math.isnan(wire.from_series(sent).points[0].value)


def test_every_state_has_a_number() -> None:
    assert [wire_values.from_state(wire_values.to_state(state)) for state in JobState] == list(
        JobState
    )
    assert len(job_pb2.JobState.keys()) == len(JobState) + 1
