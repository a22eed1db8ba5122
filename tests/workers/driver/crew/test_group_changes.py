"""Members of the group die, join and leave in the middle of a job; the result is the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from kfac_dist.config import parse_spec
from kfac_dist.runs import StepRecord
from tests.workers.whole_jobs.jobs import Jobs, line_spec
from workers.driver.wishes import WishBox, WorkerWishes

pytestmark = pytest.mark.usefixtures("processes")

STEPS = 90
BATCH = 20
JOIN, LEAVE = 30, 60
SAME = 1e-9


def run(folder: Path, num_workers: int, *, killed: str = "", scale: bool = False) -> Jobs:
    """A synchronous job of STEPS steps; `killed` is a role whose rank 0 dies in the middle.

    With `scale` a gradient worker is wished for after step JOIN, and one fewer after LEAVE.
    """
    folder.mkdir()
    jobs, wishes = Jobs(folder), WishBox()

    def disturb(record: StepRecord) -> None:
        if killed and record.step == STEPS // 2:
            os.kill(jobs.pid(killed), signal.SIGKILL)
        if scale and record.step in (JOIN, LEAVE):
            wishes.put(WorkerWishes(gradient=num_workers + (record.step == JOIN)))

    jobs.on_step = disturb
    spec = line_spec(
        steps=STEPS,
        batch_size=BATCH,
        task_args={"depth": 3},
        checkpoint={"every_steps": STEPS},
        workers={"gradient": num_workers, "inverse": 1},
    )
    assert jobs.run(parse_spec(spec), wishes=wishes).state == "SUCCEEDED"
    return jobs


def parameters(jobs: Jobs) -> np.ndarray:
    path = jobs.checkpoint(STEPS) / "parameter_server.safetensors"
    return load_file(path)["parameters"]


def every_case_is_used_once(jobs: Jobs) -> bool:
    """Each step is applied once, with as many cases as its batch has, summed over the members."""
    steps = [(r.step, r.parameter_version, r.num_cases) for r in jobs.records]
    return steps == [(step, step, BATCH) for step in range(1, STEPS + 1)]


def test_members_die_join_and_leave_without_a_trace_in_the_result(tmp_path: Path) -> None:
    still = parameters(run(tmp_path / "still", 2))
    before = set(Path("/dev/shm").iterdir())

    # The worker has a shard, the deciding one.
    worker = run(tmp_path / "worker", 3, killed="gradient_worker")
    # A shard in a process of its own moves into that of a gradient worker.
    shard = run(tmp_path / "shard", 2, killed="parameter_server")
    scaled = run(tmp_path / "scaled", 2, scale=True)

    assert "member_joined" in scaled.kinds()
    assert "member_left" in scaled.kinds()
    assert {"inverse_worker_died", "layers_moved"}.isdisjoint(scaled.kinds())
    for jobs in (worker, shard):
        assert jobs.event("member_died").step >= STEPS // 2
    for jobs in (worker, shard, scaled):
        assert every_case_is_used_once(jobs)
        np.testing.assert_allclose(parameters(jobs), still, rtol=SAME, atol=SAME)
    assert {path for path in Path("/dev/shm").iterdir() if "kfac" in path.name} <= before
