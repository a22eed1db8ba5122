"""What `watch` draws on a terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from kfac_dist.cli.watch_view import WatchView
from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.service.client import Update
from kfac_dist.service.job_records import Job, JobEvent, MetricPoint, MetricSeries


def job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "id": "digits-1",
        "name": "digits",
        "owner": "ada",
        "state": JobState.RUNNING,
        "reason": None,
        "message": None,
        "first_failure": None,
        "attempt": 2,
        "num_restarts": 1,
        "priority": 0,
        "spec": {"staleness": {"max_steps": 10}},
        "step": 30,
        "num_steps": 100,
        "created_at": 0.0,
        "updated_at": 0.0,
        "started_at": 0.0,
        "ended_at": 90.0,
        "run_dir": "/runs/x",
        "data_dir": None,
        "package": None,
        "summary": None,
        "revision": 3,
        "idempotency_key": None,
    }
    return Job(**(values | changes))


def series(name: str, step: int, value: float) -> MetricSeries:
    point = MetricPoint(step=step, time=1.0, value=value)
    return MetricSeries(name=name, points=[point], sampled_every=1)


def drawn(view: WatchView) -> str:
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def test_texts_of_a_job_are_shown_as_they_are() -> None:
    view = WatchView(job(message="[bold]a\x1b[2J", name="x"))
    event = JobEvent(
        job="digits-1",
        sequence=1,
        kind="x",
        message="\x9bb\nc",
        step=1,
        time=0.0,
        severity="error",
        role=None,
        rank=None,
        attempt=1,
        details={},
    )
    layer = "inverse_version_step.[red]l\x07"
    view.add(Update(events=[event], metrics=[series(layer, 30, 25.0)]))
    text = drawn(view)
    for shown in (r"[bold]a\u001b[2J", r"\u009bb", "    c", r"[red]l\u0007"):
        assert shown in text
    assert not {"\x1b", "\x9b", "\x07"} & set(text)


def test_it_shows_step_numbers_and_the_stalest_layer_first() -> None:
    view = WatchView(job())
    view.add(
        Update(
            metrics=[
                series("objective", 40, 12.5),
                series("inverse_staleness_steps.mean", 40, 4.0),
                series("inverse_staleness_steps.max", 40, 8.0),
                series("inverse_version_step.fresh", 40, 38),
                series("inverse_version_step.stale", 40, 25),
            ]
        )
    )
    text = drawn(view)
    for part in ("digits-1", "RUNNING", "attempt 2", "step 40/100", "objective 12.5", "at most 10"):
        assert part in text, part
    assert text.index("stale ") < text.index("fresh ")
    assert "15" in text


def test_it_shows_the_group_and_who_is_missing() -> None:
    view = WatchView(job(spec={"workers": {"gradient": 3}}))
    assert "group" not in drawn(view)
    numbers = {"epoch": 2, "gradient_workers": 2, "shards": 3}
    view.add(Update(metrics=[series(name, 40, number) for name, number in numbers.items()]))
    assert "group 2: gradient workers 2 of 3, shards 3" in drawn(view)
    view.add(Update(metrics=[series("gradient_workers", 41, 3)]))
    assert "group 2: gradient workers 3, shards 3" in drawn(view)


def test_it_shows_why_a_job_failed_and_its_last_events() -> None:
    event = JobEvent(
        job="digits-1",
        sequence=1,
        kind="x",
        message="an inverse worker died",
        step=31,
        time=0.0,
        severity="error",
        role=None,
        rank=None,
        attempt=2,
        details={},
    )
    view = WatchView(job())
    view.add(Update(events=[event]))
    view.add(Update(job=job(state=JobState.FAILED, message="too many deaths")))
    text = drawn(view)
    for part in ("FAILED", "too many deaths", "step 31 an inverse worker died", "90s"):
        assert part in text, part
