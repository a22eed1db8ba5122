"""First-order optimizers: each step has its own lr, also after a resume."""

from __future__ import annotations

import pytest
import torch

from tests.workers.whole_jobs.local_job import LocalJob, small_spec

LR = {"schedule": "cosine", "initial": 0.1, "final": 0.0, "steps": 8, "warmup_steps": 2}


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_schedule_of_lr_continues_after_a_resume(name, tmp_path):
    values = small_spec().model_dump() | {"optimizer": {"name": name, "lr": LR}}
    spec = type(small_spec()).model_validate(values)
    whole = LocalJob(spec, tmp_path)
    reports = whole.steps(5)
    resumed = LocalJob(spec, tmp_path, whole.save())
    reports += whole.steps(4)
    again = resumed.steps(4)
    assert torch.equal(whole.parameters, resumed.parameters)
    lrs = [report.lr for report in reports]
    assert lrs == [report.lr for report in reports[:5] + again]
    assert lrs[:2] == [0.05, 0.1]
    assert lrs[4] == pytest.approx(0.05)
    assert [report.update_norm > 0 for report in reports] == [True] * 7 + [False] * 2
