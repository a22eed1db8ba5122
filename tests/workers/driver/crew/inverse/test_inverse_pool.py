"""How long a job trains with old inverses while an inverse worker is being replaced."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kfac_dist.config import parse_spec
from kfac_dist.errors import WorkerDiedError
from tests.workers.whole_jobs.jobs import Jobs, line_spec
from workers.driver.crew.inverse import inverse_pool

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    """Jobs in whose step 6 inverse worker 0 is killed."""
    jobs = Jobs(tmp_path)

    def kill_one(record: object) -> None:
        if len(jobs.records) == 6:
            os.kill(jobs.pid("inverse_worker"), signal.SIGKILL)

    jobs.on_step = kill_one
    return jobs


def test_a_step_waits_for_a_successor_once_its_inverses_are_too_old(
    jobs: Jobs,
) -> None:
    staleness = {"max_steps": 8, "max_degraded_steps": 0}
    spec = line_spec(steps=40, staleness=staleness, workers={"gradient": 1, "inverse": 2})
    spec["checkpoint"]["every_steps"] = 100
    assert jobs.run(parse_spec(spec)).state == "SUCCEEDED"
    assert "waits until inverse worker 0 is back" in jobs.event("inverse_worker_awaited").message
    assert jobs.records[-1].stale_applied_total == 0
    kinds = [kind for kind in jobs.kinds() if "inverse_worker" in kind or kind == "recovered"]
    assert kinds == [
        "inverse_worker_died",
        "inverse_worker_awaited",
        "inverse_worker_replaced",
        "recovered",
    ]


def test_a_successor_that_does_not_start_is_replaced_until_restarts_are_used_up(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inverse_pool, "SUCCESSOR_SECONDS", 0.0)
    staleness = {"max_steps": 8, "max_degraded_steps": 0}
    spec = line_spec(steps=100_000, staleness=staleness, faults={"max_restarts": 2})
    with pytest.raises(WorkerDiedError, match=r"died 3 times, faults\.max_restarts is 2") as caught:
        jobs.run(parse_spec(spec))
    assert "it did not start within 0 s" in caught.value.message
    deaths = [event.details["exit"] for event in jobs.events if event.kind == "inverse_worker_died"]
    assert deaths[1:] == ["stalled", "stalled"]
