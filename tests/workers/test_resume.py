"""Oracle 14, the part without processes: saved and restored, also on other numbers of workers."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from tests.workers.local_job import LocalJob, Saved, small_spec


def trained(tmp_path, steps: int, saved: Saved | None = None, **workers: int):
    spec = small_spec(workers={"gradient": 1, "inverse": 1} | workers)
    with closing(LocalJob(spec, tmp_path, saved)) as job:
        job.steps(steps)
        return job.parameters.clone(), job.save()


def test_on_the_same_workers_it_is_the_uninterrupted_run_bit_for_bit(tmp_path):
    straight, _ = trained(tmp_path, 14)
    _, saved = trained(tmp_path, 7)
    resumed, _ = trained(tmp_path, 7, saved)
    assert torch.equal(resumed, straight)


@pytest.mark.parametrize("workers", [{"gradient": 3}, {"inverse": 2}])
def test_on_other_numbers_of_workers_it_is_the_same_run_to_rounding(tmp_path, workers):
    straight, _ = trained(tmp_path, 14)
    _, saved = trained(tmp_path, 7)
    resumed, _ = trained(tmp_path, 7, saved, **workers)
    torch.testing.assert_close(resumed, straight, rtol=1e-9, atol=1e-12)


def test_an_asynchronous_run_stays_within_its_bound_and_learns(tmp_path):
    spec = small_spec(staleness={"max_steps": 6}, steps=30)
    with closing(LocalJob(spec, tmp_path)) as job:
        reports = job.steps(30)
    for report in reports:
        oldest = min(report.inverse_version_step.values())
        assert report.step - oldest <= 6
        # The order of the model, whichever inverse came first.
        assert list(report.inverse_version_step) == ["encoder1", "code", "decoder1", "output"]
    assert reports[-1].objective < reports[0].objective / 2
    assert reports[-1].stale_applied_total == 0
