"""Oracle 14, without processes: a job is saved and restored, also on other numbers of workers."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from tests.workers.whole_jobs.local_job import LocalJob, Saved, chain_spec, small_spec


def trained(tmp_path, steps: int, saved: Saved | None = None, **workers: int):
    spec = small_spec(workers={"gradient": 1, "inverse": 1} | workers)
    with closing(LocalJob(spec, tmp_path, saved)) as job:
        job.steps(steps)
        return job.parameters.clone(), job.save()


def test_a_resumed_run_on_the_same_workers_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    straight, _ = trained(tmp_path, 14)
    _, saved = trained(tmp_path, 7)
    resumed, _ = trained(tmp_path, 7, saved)
    assert torch.equal(resumed, straight)


@pytest.mark.parametrize("workers", [{"gradient": 3}, {"inverse": 2}])
def test_a_resumed_run_on_other_numbers_of_workers_equals_it_to_rounding(tmp_path, workers):
    straight, _ = trained(tmp_path, 14)
    _, saved = trained(tmp_path, 7)
    resumed, _ = trained(tmp_path, 7, saved, **workers)
    torch.testing.assert_close(resumed, straight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inverse", ["block_diagonal", "ekfac"])
def test_a_run_on_two_shards_is_resumed_on_any_number_of_them_bit_for_bit(tmp_path, inverse):
    """Step 6 chooses among three gammas; four is more shards than the model has layers."""

    def run(steps: int, saved: Saved | None = None, **workers: Any):
        spec = chain_spec(tmp_path, optimizer={"inverse": inverse}, workers=workers)
        with closing(LocalJob(spec, tmp_path, saved)) as job:
            job.steps(steps)
            return job.parameters.clone(), job.save(), len(job.plan)

    straight, end, _ = run(12)
    _, saved, _ = run(6, parameter_server=2)
    for count in (1, 4):
        resumed, again, num_shards = run(6, saved, parameter_server=count)
        assert num_shards == count
        assert torch.equal(resumed, straight)
        assert again.server.keys() == end.server.keys()
        for name, array in end.server.items():
            np.testing.assert_array_equal(again.server[name], array, err_msg=name)
    resumed, _, num_shards = run(6, saved, gradient=3)  # a shard beside each gradient worker
    assert num_shards == 3
    torch.testing.assert_close(resumed, straight, rtol=1e-9, atol=1e-12)


def test_a_checkpoint_has_the_names_that_it_had_before_there_were_shards(tmp_path):
    for count in (1, 3):
        _, saved = trained(tmp_path, 6, parameter_server=count)
        names = {name for name in saved.server if not name.startswith(("inverse:", "count:"))}
        assert names == {
            "average:average",
            "average:num_averaged",
            "parameters",
            "stale_applied",
            "update:damping",
            "update:fisher_noise",
            "update:gamma",
            "update:previous_update",
            "update:search",
            "version",
        }
        inverse = {name for name in saved.server if name.startswith("inverse:code/")}
        assert inverse >= {"inverse:code/used", "inverse:code/6/0/gamma", "inverse:code/6/0/pi"}
        assert len(saved.server["parameters"]) == len(saved.server["update:previous_update"])


@pytest.mark.parametrize("step", [6, 7])
@pytest.mark.parametrize("inverse", ["block_tridiagonal", "ekfac"])
def test_any_structure_and_number_of_inverse_workers_equal_it_bit_for_bit(tmp_path, inverse, step):
    """Step 6 chooses among three gammas; step 7 computes moments in the bases of step 6."""

    def run(steps: int, saved: Saved | None = None, num_workers: int = 2):
        spec = chain_spec(
            tmp_path, optimizer={"inverse": inverse}, workers={"inverse": num_workers}
        )
        with closing(LocalJob(spec, tmp_path, saved)) as job:
            job.steps(steps)
            return job.parameters.clone(), job.save()

    straight, _ = run(14)
    _, saved = run(step)
    for num_workers in (2, 3):
        resumed, _ = run(14 - step, saved, num_workers)
        assert torch.equal(resumed, straight)


@pytest.mark.parametrize("inverse", ["block_tridiagonal", "ekfac"])
def test_an_asynchronous_run_with_any_structure_learns(tmp_path, inverse):
    spec = chain_spec(
        tmp_path,
        optimizer={"inverse": inverse},
        staleness={"max_steps": 6},
        workers={"gradient": 2, "inverse": 2},
    )
    with closing(LocalJob(spec, tmp_path)) as job:
        reports = job.steps(40)
    for report in reports:
        assert report.step - min(report.inverse_version_step.values()) <= 6
    assert reports[-1].objective < reports[0].objective / 2
    assert sum(reports[-1].numeric_events.values()) == 0


def test_an_asynchronous_run_stays_within_its_bound_and_learns(tmp_path):
    spec = small_spec(staleness={"max_steps": 6}, steps=30)
    with closing(LocalJob(spec, tmp_path)) as job:
        reports = job.steps(30)
    for report in reports:
        oldest = min(report.inverse_version_step.values())
        assert report.step - oldest <= 6
        # Reports have the order of the model, whichever inverse came first.
        layers = [name.partition("[")[0] for name in report.inverse_version_step]
        assert layers == ["encoder1", "encoder1", "code", "decoder1", "output", "output"]
    assert reports[-1].objective < reports[0].objective / 2
    assert reports[-1].stale_applied_total == 0
