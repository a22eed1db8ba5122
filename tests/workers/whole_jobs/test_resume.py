"""Oracle 14, without processes: a job is saved and restored, also on other numbers of workers."""

from __future__ import annotations

from contextlib import closing

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
