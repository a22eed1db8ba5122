"""The number of inverse workers changes while a job runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.config import parse_spec
from tests.waiting import wait_until
from tests.workers.whole_jobs.jobs import Jobs, line_spec
from workers.driver.wishes import WishBox, WorkerWishes

pytestmark = pytest.mark.usefixtures("processes")


def test_a_synchronous_job_on_1_then_3_then_1_inverse_workers_equals_the_undisturbed_one(
    tmp_path: Path,
) -> None:
    spec = line_spec(steps=60, task_args={"depth": 3}, checkpoint={"every_steps": 60})
    spec["evaluation"] = {"every_steps": 1}  # so each window has one step
    spec["optimizer"]["factor_update_period"] = 3
    still, jobs, wishes = Jobs(tmp_path), Jobs(tmp_path), WishBox()
    still.run(parse_spec(spec), run_dir="still")

    def scale(record: object) -> None:
        num = len(jobs.records)
        if num == 6:
            wishes.put(WorkerWishes(inverse=3))
        if num == 9:
            for rank in (1, 2):
                log = jobs.run_folder().places.log("inverse_worker", rank)
                wait_until(lambda log=log: log.exists() and "started" in log.read_text(), "a start")
        if num == 45:
            wishes.put(WorkerWishes(inverse=1))

    jobs.on_step = scale
    jobs.run(parse_spec(spec), wishes=wishes)
    three, one = [e for e in jobs.events if e.kind == "inverse_workers_scaled"]
    assert three.message.startswith("3 inverse workers from step ")
    assert 2 <= three.message.count(",") + 1 <= 3, "only layers that must move do"
    assert one.message.startswith("1 inverse workers from step 46 on: ")
    queues = [set(record.inverse_queue_depth) for record in jobs.records]
    assert {"0", "1", "2"} in queues[:45]
    for role in ("parameter_server", "factors"):
        names = [folder / f"{role}.safetensors" for folder in saved(still, jobs)]
        undisturbed, scaled = (name.read_bytes() for name in names)
        assert scaled == undisturbed
    assert jobs.records[-1].numeric_events == still.records[-1].numeric_events


def saved(still: Jobs, jobs: Jobs) -> tuple[Path, Path]:
    return still.checkpoint(60, "still"), jobs.checkpoint(60)
