"""No statistics are lost with an inverse worker, and a synchronous run stays synchronous."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from kfac_dist.config import parse_spec
from tests.workers.whole_jobs.jobs import Jobs, line_spec
from workers.checkpoint import load_newest

pytestmark = pytest.mark.usefixtures("processes")

SYNCHRONOUS = {"max_steps": 0}


def arrays(jobs: Jobs, run_dir: str) -> dict[str, np.ndarray]:
    loaded = load_newest(jobs.run_folder(run_dir).places.checkpoints)
    assert loaded is not None
    return {f"{role}/{n}": array for role, own in loaded.roles.items() for n, array in own.items()}


def kill_at(jobs: Jobs, step: int, run_dir: str) -> None:
    def kill_one(record: object) -> None:
        if len(jobs.records) == step:
            os.kill(jobs.pid("inverse_worker", run_dir), signal.SIGKILL)

    jobs.records.clear()
    jobs.on_step = kill_one


def test_a_synchronous_job_ends_bitwise_as_if_its_inverse_worker_had_not_been_killed(
    tmp_path: Path,
) -> None:
    jobs = Jobs(tmp_path)
    workers = {"gradient": 1, "inverse": 1}
    checkpoint = {"every_steps": 25}
    spec = parse_spec(
        line_spec(steps=50, staleness=SYNCHRONOUS, workers=workers, checkpoint=checkpoint)
    )
    jobs.run(spec, run_dir="undisturbed")
    expected = arrays(jobs, "undisturbed")
    kill_at(jobs, 22, "killed")  # the copy of the averages is older
    assert jobs.run(spec, run_dir="killed").state == "SUCCEEDED"
    assert "wait for its successor" in jobs.event("inverse_worker_died").message
    assert jobs.records[-1].stale_applied_total == 0
    found = arrays(jobs, "killed")
    assert found.keys() == expected.keys()
    assert [name for name in found if not np.array_equal(found[name], expected[name])] == []


def test_an_asynchronous_job_averages_the_statistics_of_every_step(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    kill_at(jobs, 40, "run")
    spec = line_spec(
        steps=1000, staleness={"max_steps": 100}, workers={"gradient": 2, "inverse": 1}
    )
    spec["checkpoint"]["every_steps"] = 1000
    assert jobs.run(parse_spec(spec)).state == "SUCCEEDED"
    assert "inverse_worker_died" in jobs.kinds()
    assert {"statistics_lost", "factors_missing"}.isdisjoint(jobs.kinds())
    counts = {int(a) for name, a in arrays(jobs, "run").items() if name.endswith("/num_updates")}
    assert counts == {1000}
    troubles = jobs.records[-1].numeric_events
    assert not {"late_statistics", "dropped_statistics"} & troubles.keys()
