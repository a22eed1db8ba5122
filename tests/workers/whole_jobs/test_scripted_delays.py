"""Oracle 13: a run with scripted delays equals a serial simulation of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kfac_dist.config import parse_spec
from kfac_dist.core.vector import flatten
from tests.paths import ROOT
from tests.workers.whole_jobs.local_job import LocalJob, small_spec
from tests.workers.whole_jobs.test_distributed_is_serial import serial_run
from workers.exchange.messages import StatisticsMessage

NUM_STEPS = 26
INVERSES = ("block_diagonal", "block_tridiagonal", "ekfac")
DELAYS = ({"*": 0}, {"*": 3}, {"*": 9, "2": 2, "[34]": 5})
EXAMPLES = ROOT / "examples"


def scripted_spec(inverse: str, delays: dict[str, int], **changes: Any) -> Any:
    values = small_spec(**changes).model_dump()
    values |= {"task": f"{EXAMPLES}/custom_task.py:DampedWave", "task_args": {"width": 6}}
    values["data"]["name"] = None
    values["optimizer"]["inverse"] = inverse
    values["staleness"] |= {"max_steps": 40, "delay_steps": delays}
    return parse_spec(values)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    jobs: list[LocalJob] = []

    def start(spec: Any, *saved: Any, kind: type[LocalJob] = LocalJob) -> LocalJob:
        jobs.append(kind(spec, tmp_path, *saved))
        return jobs[-1]

    yield start
    for job in jobs:
        job.close()


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("delays", DELAYS, ids=["none", "one", "by_layer"])
def test_scripted_delays_equal_the_serial_simulation_bit_for_bit(inverse, delays, run, tmp_path):
    spec = scripted_spec(inverse, delays, workers={"gradient": 1, "inverse": 2})
    job = run(spec)
    reports = job.steps(NUM_STEPS)
    serial, results = serial_run(spec, tmp_path, NUM_STEPS, delay_steps=delays)
    for report, result in zip(reports, results, strict=True):
        for name in ("loss", "damping", "gamma", "update_norm"):
            assert getattr(report, name) == getattr(result, name), (report.step, name)
    assert torch.equal(job.parameters, flatten(serial._parameters))
    assert any(report.gamma != reports[0].gamma for report in reports), "gamma was searched for"


@pytest.mark.parametrize("inverse", INVERSES)
def test_scripted_delays_equal_the_simulation_after_a_warm_up(inverse, run, tmp_path):
    spec = scripted_spec(inverse, {"*": 9}, staleness={"warmup_steps": 10})
    job = run(spec)
    reports = job.steps(NUM_STEPS)
    serial, _ = serial_run(spec, tmp_path, NUM_STEPS, delay_steps={"*": 9}, warmup_steps=10)
    assert torch.equal(job.parameters, flatten(serial._parameters))
    for report in reports[:10]:
        newest = job.schedule.last_refresh(report.step)
        assert set(report.inverse_version_step.values()) == {newest}
    assert max(r.step - min(r.inverse_version_step.values()) for r in reports[10:]) > 9


def test_each_layer_is_as_old_as_its_script_says(run):
    delays = {"*": 9, "2": 2}
    job = run(scripted_spec("block_diagonal", delays))
    refreshes = [
        step for step in range(1, NUM_STEPS + 1) if job.schedule.plan(step).refresh_inverses
    ]
    for report in job.steps(NUM_STEPS):
        for layer, version in report.inverse_version_step.items():
            delay = 2 if layer == "2" else 9
            old_enough = [step for step in refreshes if step + delay <= report.step]
            assert version == max(old_enough, default=1)


class StrayMessages(LocalJob):
    """Every statistics message arrives twice, and each time an old one arrives again."""

    def _send(self, step: int, messages: Mapping[int, list[StatisticsMessage]]) -> None:
        for rank, own in messages.items():
            for message in own:
                self._sent = [*getattr(self, "_sent", []), (rank, message)]
                old_rank, stray = random.Random(message.header.step).choice(self._sent)
                super()._send(step, {rank: [message, message]})
                super()._send(step, {old_rank: [stray]})


def test_duplicated_and_late_statistics_change_nothing(run):
    spec = scripted_spec("block_diagonal", {"*": 3})
    plain, stray = run(spec), run(spec, kind=StrayMessages)
    plain.steps(NUM_STEPS)
    stray.steps(NUM_STEPS)
    assert torch.equal(plain.parameters, stray.parameters)
    status = stray.loops[0].status()
    assert status.duplicates + status.late >= NUM_STEPS


@pytest.mark.parametrize("inverse", INVERSES)
def test_a_run_resumed_between_a_refresh_and_its_use_equals_the_uninterrupted_one(inverse, run):
    spec = scripted_spec(inverse, {"*": 5})
    straight = run(spec)
    straight.steps(NUM_STEPS)
    first = run(spec)
    first.steps(14)  # the refresh of step 12 is used in step 17
    resumed = run(spec, first.save())
    resumed.steps(NUM_STEPS - 14)
    assert torch.equal(resumed.parameters, straight.parameters)
