"""Notices of preemption: members that have one are replaced."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kfac_dist.config import parse_spec
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
        if "member_joined" in jobs.kinds():
            raise KeyboardInterrupt

    jobs.on_step = give_notice
    spec = line_spec(
        steps=100_000,
        staleness={"max_steps": 20},
        checkpoint={"every_steps": 90_000},
        faults={"max_restarts": 0},
    )
    with pytest.raises(KeyboardInterrupt):
        jobs.run(parse_spec(spec))
    assert jobs.event("inverse_worker_died").details["exit"] == "preempted"
    left = jobs.event("member_left")
    assert (left.role, left.rank) == ("gradient_worker", 0)
    assert jobs.checkpoint(left.step).is_dir()
    assert "member_died" not in jobs.kinds()
