"""Asynchronous jobs on real Ray actors are replayed from their records."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from kfac_dist.config import JobSpec, WorkersSpec, parse_spec
from kfac_dist.runs import StepRecord
from kfac_dist.runs.replay_plan import ReplayPlan, plan_replay
from kfac_dist.runs.writing import write_whole
from tests.workers.whole_jobs.jobs import Jobs, line_spec
from workers.checkpoint import load_newest, write_checkpoint
from workers.cluster.cluster import local_room
from workers.driver.replay import ReplayResult, run_replay

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.timeout(600)]
STEPS = 32
HELD = range(8, 20)  # steps in which an inverse worker is stopped


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path)


def asynchronous(inverse: str = "block_diagonal", **changes: Any) -> JobSpec:
    optimizer = {
        "damping": {"initial": 1.0},
        "gamma": {"adapt_period": 5},
        "inverse": inverse,
        "inverse_update_period": 4,
        "statistics_fraction": 1.0,
        "fisher_fraction": 0.5,
    }
    values = {
        "steps": STEPS,
        "optimizer": optimizer,
        "task_args": {"depth": 3, "normalised": True},
        "workers": {"gradient": 2, "inverse": 2},
        "staleness": {"max_steps": 6, "at_bound": "damp"},
        "checkpoint": {"every_steps": STEPS},
        "evaluation": {"every_steps": 7},
    }
    return parse_spec(line_spec(**(values | changes)))


def holding_an_inverse_worker(jobs: Jobs) -> Callable[[StepRecord], None]:
    """Stop an inverse worker for some steps, so that its layers exceed the staleness bound."""

    def on_step(record: StepRecord) -> None:
        if record.step in (HELD.start, HELD.stop):
            number = signal.SIGSTOP if record.step == HELD.start else signal.SIGCONT
            os.kill(jobs.pid("inverse_worker"), number)

    return on_step


def replay(jobs: Jobs, plan: ReplayPlan, run_dir: str = "again") -> ReplayResult:
    return run_replay(
        plan,
        checkpoints_dir=jobs.run_folder().places.checkpoints,
        base_dir=jobs.folder,
        data_dir=None,
        home=jobs.folder / "home",
        run_dir=jobs.folder / run_dir,
    )


def tensors(jobs: Jobs, run_dir: str, step: int) -> dict[str, bytes]:
    return {
        f"{path.name}/{name}": array.tobytes()
        for path in sorted(jobs.checkpoint(step, run_dir).glob("*.safetensors"))
        for name, array in load_file(path).items()
        if not name.startswith(("inverse:", "count:"))
    }


def test_an_asynchronous_job_and_its_resumption_are_replayed(
    jobs: Jobs,
) -> None:
    patient = {"stall_seconds": 300.0}  # the machine may be slow
    jobs.on_step = holding_an_inverse_worker(jobs)
    jobs.run(asynchronous("ekfac", faults=patient))
    jobs.on_step = lambda record: None
    longer = STEPS + 8
    jobs.run(asynchronous("ekfac", steps=longer, faults=patient), resume=True)
    records = jobs.run_folder().read_metrics()
    assert any(len(set(record.inverse_version_step.values())) > 1 for record in records)
    assert any("damp" in record.stale_layers.values() for record in records)
    assert len({record.gamma for record in records}) > 1, "gamma was searched for"

    started = [event.details for event in jobs.events if event.kind == "started"]
    assert [details["gradient_workers"] for details in started] == [2, 2]
    assert [details["inverse_device"] for details in started] == ["cpu", "cpu"]
    assert [details["float32_precision"] for details in started] == ["highest", "highest"]

    plan = plan_replay(jobs.run_folder(), None)
    assert (plan.last_step, plan.stop) == (longer, None)
    result = replay(jobs, plan)
    assert (result.difference, result.num_steps) == (None, longer)
    assert result.checkpoint_step == longer
    assert "buffers.safetensors/0.running_mean" in tensors(jobs, "run", longer)
    assert tensors(jobs, "again", longer) == tensors(jobs, "run", longer)
    again = jobs.run_folder("again").read_metrics()
    assert [r.evaluation for r in again] == [r.evaluation for r in records]
    assert [r.inverse_gammas for r in again] == [r.inverse_gammas for r in records]


def test_tampered_records_are_found(jobs: Jobs) -> None:
    jobs.run(asynchronous())
    folder = jobs.run_folder()
    records = folder.read_metrics()

    def write(changed: StepRecord) -> None:
        lines = [changed if record.step == changed.step else record for record in records]
        text = "".join(f"{record.model_dump_json()}\n" for record in lines)
        write_whole(folder.path / "metrics.jsonl", text)

    write(records[6].model_copy(update={"loss": records[6].loss * (1 + 1e-15)}))
    found = replay(jobs, plan_replay(folder, None), "loss").difference
    assert found is not None
    assert (found.step, found.field) == (7, "loss")
    assert found.replayed == records[6].loss
    summary = jobs.run_folder("loss").read_summary()
    assert summary is not None
    assert (summary.state, summary.reason, summary.step) == ("FAILED", "replay_differs", 7)

    # Now the records say that a version was used one step earlier than it was.
    late, layer = next(
        (record, layer)
        for record in records[10:]
        for layer in record.inverse_gammas
        if record.inverse_version_step[layer] < record.step
    )
    before = records[late.step - 2]
    versions = before.inverse_version_step | {layer: late.inverse_version_step[layer]}
    write(before.model_copy(update={"inverse_version_step": versions}))
    found = replay(jobs, plan_replay(folder, None), "version").difference
    assert found is not None
    assert found.step == before.step
    assert found.field != "inverse_version_step"


def test_a_replay_ends_at_the_death_of_an_inverse_worker(jobs: Jobs) -> None:
    def kill(record: StepRecord) -> None:
        if record.step == 9:
            os.kill(jobs.pid("inverse_worker"), signal.SIGKILL)

    jobs.on_step = kill
    jobs.run(asynchronous(checkpoint={"every_steps": 4}))
    died = jobs.event("inverse_worker_died").step
    plan = plan_replay(jobs.run_folder(), None)
    assert plan.stop is not None
    assert plan.stop.step == died
    assert f"inverse worker 0 died in step {died}" in plan.stop.reason
    result = replay(jobs, plan)
    assert (result.num_steps, result.difference) == (died - 1, None)


def test_a_first_order_job_is_replayed_and_a_changed_checkpoint_is_found(jobs: Jobs) -> None:
    jobs.run(asynchronous(optimizer={"name": "adam"}, steps=6, checkpoint={"every_steps": 3}))
    result = replay(jobs, plan_replay(jobs.run_folder(), None))
    assert (result.num_steps, result.difference, result.checkpoint_step) == (6, None, 6)

    whole = load_newest(jobs.run_folder().places.checkpoints)
    assert whole is not None
    whole.roles["parameter_server"]["parameters"][0] += 1e-12
    write_checkpoint(jobs.run_folder().places.checkpoints, 6, whole.roles, whole.state, keep=1)
    found = replay(jobs, plan_replay(jobs.run_folder(), None), "other").difference
    assert found is not None
    assert (found.step, found.field) == (6, "checkpoint parameter_server/parameters")


def test_a_replay_has_room_for_more_workers_than_the_machine_has_cpus() -> None:
    own = local_room()
    many = WorkersSpec(gradient=own.num_cpus + 1, threads=2, inverse=own.num_inverse_slots + 3)
    room = local_room(many)
    assert room.num_cpus == 2 * (own.num_cpus + 1)
    assert room.num_inverse_slots == own.num_inverse_slots + 3
    assert local_room(WorkersSpec()) == own
