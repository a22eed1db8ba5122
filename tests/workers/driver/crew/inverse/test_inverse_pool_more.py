"""An inverse worker that finds that the job cannot continue is not replaced."""

from __future__ import annotations

import pytest

from kfac_dist.coordination.steps.assignment import CostModel
from kfac_dist.errors import JobFailedError
from workers.device import DevicePlan
from workers.driver.crew.inverse import inverse_pool
from workers.driver.crew.inverse.inverse_pool import InversePool
from workers.driver.crew.inverse.inverse_process import InverseProcess
from workers.exchange.messages import InverseSetup


def test_a_full_gpu_ends_the_job_instead_of_one_worker_after_the_other(monkeypatch):
    full = JobFailedError("the memory of the GPU is full", reason="gpu_memory")
    monkeypatch.setattr(inverse_pool, "failure_of", lambda lifeline: full)
    deaths: list[object] = []
    devices = DevicePlan(kind="cpu", backend="gloo", gpus_per_member=0.0)
    pool = InversePool(None, None, devices, {}, deaths.append)
    setup = InverseSetup(
        rank=0,
        layers=(),
        links=(),
        cost_model=CostModel(cubic=1e-11, quadratic=1e-8),
        assignment_epoch=1,
        applied_step=0,
        exact_step=None,
    )
    pool._workers = {
        0: InverseProcess(setup=setup, handle=None, lifeline="line", first_status=None)
    }
    with pytest.raises(JobFailedError) as caught:
        pool.handle_death("line")
    assert caught.value is full
    assert deaths == []
