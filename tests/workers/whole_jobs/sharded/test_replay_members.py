"""Jobs whose members change are replayed through the changes, or up to the one that forbids it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kfac_dist.config import JobSpec, parse_spec
from kfac_dist.runs import StepRecord
from kfac_dist.runs.replay_plan import ReplayPlan, plan_replay
from tests.waiting import wait_until
from tests.workers.whole_jobs.jobs import Jobs, line_spec
from workers.driver.replay import ReplayResult, run_replay
from workers.driver.wishes import WishBox, WorkerWishes

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.timeout(300)]
STEPS = 30


def asynchronous() -> JobSpec:
    optimizer = {
        "damping": {"initial": 1.0},
        "gamma": {"adapt_period": 5},
        "inverse_update_period": 4,
        "statistics_fraction": 1.0,
        "fisher_fraction": 0.5,
    }
    values = {
        "optimizer": optimizer,
        "task_args": {"depth": 3},
        "workers": {"gradient": 2, "inverse": 2},
        "staleness": {"max_steps": 6, "at_bound": "wait"},
        "checkpoint": {"every_steps": 10},
        "evaluation": {"every_steps": 7},
        "steps": STEPS,
    }
    return parse_spec(line_spec(**values))


def replay(jobs: Jobs, plan: ReplayPlan) -> ReplayResult:
    return run_replay(
        plan,
        checkpoints_dir=jobs.run_folder().places.checkpoints,
        base_dir=jobs.folder,
        data_dir=None,
        home=jobs.folder / "home",
        run_dir=jobs.folder / "again",
    )


def wait_for_log(jobs: Jobs, rank: int, word: str) -> None:
    log = jobs.run_folder().places.log("gradient_worker", rank)
    wait_until(lambda: log.exists() and word in log.read_text(), f"gradient worker {rank}")


def test_a_replay_goes_through_a_join_a_leave_and_a_shard_that_moved(tmp_path: Path) -> None:
    jobs, wishes = Jobs(tmp_path), WishBox()

    def on_step(record: StepRecord) -> None:
        if record.step == 3:
            wishes.put(WorkerWishes(gradient=3))
        if record.step == 8:
            wait_for_log(jobs, 2, "built")
        if record.step == 14:  # after its evaluation, so that the next step is begun
            os.kill(jobs.pid("parameter_server"), signal.SIGKILL)
        if record.step == 21:
            wishes.put(WorkerWishes(gradient=2))

    jobs.on_step = on_step
    summary = jobs.run(asynchronous(), wishes=wishes)
    counts = {"gradient": 2, "inverse": 2, "parameter_server": 1}
    assert summary.workers.model_dump() == counts
    assert summary.workers_at_end is not None
    assert summary.workers_at_end.model_dump() == counts
    groups = {r.epoch: (r.gradient_workers, r.shards) for r in jobs.records}
    assert groups == {1: (2, 1), 2: (3, 1), 3: (3, 1), 4: (2, 1)}
    assert not any(record.incomplete for record in jobs.records)
    died, joined, left = map(jobs.event, ("member_died", "member_joined", "member_left"))
    assert (died.severity, joined.severity, left.severity) == ("warning", "info", "info")
    assert died.details["repeats_step"]
    assert not died.details["undoes_step"]
    changes = [event.details["after_step"] for event in (joined, left)]

    plan = plan_replay(jobs.run_folder(), None)
    assert plan.stop is None
    assert plan.script.gradient_workers == {changes[0] + 1: 3, changes[1] + 1: 2}
    assert plan.spec.workers.parameter_server == 1
    result = replay(jobs, plan)
    assert (result.num_steps, result.difference, result.checkpoint_step) == (STEPS, None, STEPS)
    again = jobs.run_folder("again").read_metrics()
    numbers = [record.gradient_workers for record in jobs.records]
    assert [record.gradient_workers for record in again] == numbers
