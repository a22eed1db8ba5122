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
from tests.waiting import wait_until
from tests.workers.whole_jobs.jobs import Jobs, line_spec
from workers.driver.wishes import WishBox, WorkerWishes

pytestmark = pytest.mark.usefixtures("processes")

STEPS = 90
BATCH = 20
DEATH, JOIN, LEAVE = 15, 30, 60
SAME = 1e-9


def run(jobs: Jobs, num_workers: int, wishes: WishBox | None = None) -> Jobs:
    spec = line_spec(
        steps=STEPS,
        batch_size=BATCH,
        task_args={"depth": 3},
        checkpoint={"every_steps": 15},  # no window goes beyond one
        workers={"gradient": num_workers, "inverse": 1},
    )
    assert jobs.run(parse_spec(spec), wishes=wishes or WishBox()).state == "SUCCEEDED"
    return jobs


def new_jobs(folder: Path) -> Jobs:
    folder.mkdir()
    return Jobs(folder)


def undisturbed(folder: Path) -> Jobs:
    return run(new_jobs(folder), 1)


def shard_dies(folder: Path) -> Jobs:
    """The only shard, in a process of its own, dies in the middle."""
    jobs = new_jobs(folder)

    def kill(record: StepRecord) -> None:
        if record.step == STEPS // 2:
            os.kill(jobs.pid("parameter_server"), signal.SIGKILL)

    jobs.on_step = kill
    return run(jobs, 1)


def workers_come_and_go(folder: Path) -> Jobs:
    """Each worker has a shard; the one with the deciding shard dies, one joins, one leaves."""
    jobs, wishes = new_jobs(folder), WishBox()

    def num_built() -> int:
        log = jobs.run_folder().places.log("gradient_worker", 0)
        return log.read_text().count('"event": "built"')

    def disturb(record: StepRecord) -> None:
        if record.step == DEATH:
            os.kill(jobs.pid("gradient_worker"), signal.SIGKILL)
        elif record.step == JOIN:
            wait_until(lambda: num_built() == 2, "the successor")
        elif record.step == LEAVE:
            wishes.put(WorkerWishes(gradient=2))

    jobs.on_step = disturb
    return run(jobs, 3, wishes)


def parameters(jobs: Jobs) -> np.ndarray:
    path = jobs.checkpoint(STEPS) / "parameter_server.safetensors"
    return load_file(path)["parameters"]


def every_case_is_used_once(jobs: Jobs) -> bool:
    """Each step is applied once, with as many cases as its batch has, summed over the members."""
    steps = [(r.step, r.parameter_version, r.num_cases) for r in jobs.records]
    return steps == [(step, step, BATCH) for step in range(1, STEPS + 1)]


def test_members_die_join_and_leave_without_a_trace_in_the_result(tmp_path: Path) -> None:
    still = parameters(undisturbed(tmp_path / "still"))
    shard = shard_dies(tmp_path / "shard")
    workers = workers_come_and_go(tmp_path / "workers")

    assert shard.event("member_died").details["shards"] == 1
    kinds = [kind for kind in workers.kinds() if kind.startswith("member_")]
    assert kinds == ["member_died", "member_joined", "member_left"]
    assert [workers.event(kind).details["shards"] for kind in kinds] == [2, 3, 2]
    assert DEATH <= workers.event("member_died").step < JOIN <= workers.event("member_joined").step
    assert workers.event("member_joined").step < LEAVE <= workers.event("member_left").step
    for jobs in (shard, workers):
        assert every_case_is_used_once(jobs)
        assert {"inverse_worker_died", "inverse_workers_scaled"}.isdisjoint(jobs.kinds())
        np.testing.assert_allclose(parameters(jobs), still, rtol=SAME, atol=SAME)
