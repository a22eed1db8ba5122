"""Notices of preemption: an inverse worker is replaced, another member ends the attempt."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kfac_dist.config import parse_spec
from kfac_dist.errors import JobFailedError
from tests.workers.whole_jobs.jobs import Jobs, line_spec

pytestmark = pytest.mark.usefixtures("processes")


def test_notices_are_followed_by_a_checkpoint_and_not_counted_as_deaths(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    told: list[str] = []

    def give_notice(record: object) -> None:
        recovered = "recovered" in jobs.kinds()
        ready = {"inverse_worker": len(jobs.records) == 6, "gradient_worker": recovered}
        for role, is_ready in ready.items():
            if is_ready and role not in told:
                told.append(role)
                os.kill(jobs.pid(role), signal.SIGTERM)

    jobs.on_step = give_notice
    spec = line_spec(
        steps=100_000,
        staleness={"max_steps": 20},
        checkpoint={"every_steps": 90_000},
        faults={"max_restarts": 0},
    )
    with pytest.raises(JobFailedError, match=r"gradient worker 0 \(pid \d+\) had notice") as caught:
        jobs.run(parse_spec(spec))
    assert caught.value.reason == "preempted"
    assert jobs.event("inverse_worker_died").details["exit"] == "preempted"
    step = jobs.records[-1].step
    assert caught.value.message.endswith(f"the newest checkpoint is of step {step}")
    assert jobs.checkpoint(step).is_dir()
