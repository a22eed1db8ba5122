"""The built-in tasks in a whole job, with their files in the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kfac_dist.config import AdamSpec, JobSpec, WorkersSpec
from tests.data.small_sets import write_cifar10, write_text
from tests.workers.whole_jobs.local_job import LocalJob

CONVNET = {"network": "convnet", "channels": [4, 8]}
TRANSFORMER = {"context": 8, "width": 8, "num_heads": 2, "num_blocks": 1}


@pytest.mark.parametrize(
    ("write", "task"),
    [
        (
            write_cifar10,
            {"task": "classifier", "task_args": CONVNET, "data": {"name": "cifar10", "limit": 8}},
        ),
        (
            write_text,
            {
                "task": "char_transformer",
                "task_args": TRANSFORMER,
                "data": {"name": "text", "limit": 8},
            },
        ),
    ],
)
def test_two_workers_learn_the_same_as_one(
    write: Callable[[Path], None], task: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path)
    results = []
    for num_workers in (1, 2):
        spec = JobSpec(
            name="small",
            **task,
            steps=12,
            batch_size=8,
            dtype="float64",
            optimizer=AdamSpec(name="adam", lr=0.02),
            workers=WorkersSpec(gradient=num_workers),
        )
        job = LocalJob(spec, tmp_path)
        losses = [report.loss for report in job.steps(12)]
        assert losses[-1] < 0.8 * losses[0]
        results.append(job.parameters.clone())
        job.close()
    torch.testing.assert_close(*results)
