"""However the data is read, and by how many processes, the job is the same."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import load

from kfac_dist.config import parse_spec
from kfac_dist.tasks import load_task
from tests.waiting import wait_until
from tests.workers.whole_jobs.jobs import TASK, Jobs, line_spec
from tests.workers.whole_jobs.local_job import LocalJob, job_context, user_spec
from workers.gradient_worker.data_processes import TaskCases
from workers.gradient_worker.reading import CaseRange, PlainReader

STREAM = (
    TASK
    + """

class Pairs:
    def __init__(self, tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors[0])

    def __iter__(self):
        return zip(*self.tensors)


class Streamed(Line):
    def train_data(self, data_dir):
        return Pairs(super().train_data(data_dir).tensors)
"""
)

NOISY = """

import random


class Augmented:
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        inputs, target = self.data[index]
        return inputs + 0.1 * random.random() + 0.1 * torch.rand(6), target


class Noisy(Line):
    def train_data(self, data_dir):
        return Augmented(super().train_data(data_dir))
"""


def test_a_stream_has_the_same_batches_for_every_number_of_workers(tmp_path: Path) -> None:
    ends = []
    for gradient in (1, 2, 3):
        spec = user_spec(tmp_path, STREAM, "Streamed", workers={"gradient": gradient})
        job = LocalJob(spec, tmp_path)
        losses = [report.loss for report in job.steps(5)]  # over the end of an epoch
        ends.append((losses, job.parameters))
        job.close()
    for losses, parameters in ends[1:]:
        assert losses == pytest.approx(ends[0][0], rel=1e-9)
        torch.testing.assert_close(parameters, ends[0][1], rtol=1e-9, atol=1e-12)


def test_a_stream_is_read_in_a_data_process_as_in_the_worker(tmp_path: Path) -> None:
    spec = user_spec(tmp_path, STREAM, "Streamed", data={"name": None, "num_workers": 1})
    job = job_context(spec, tmp_path)
    task = load_task(spec, tmp_path)
    own = PlainReader({"train": task.train_data(), "test": task.test_data()}, seed=spec.seed)
    there = TaskCases(job)
    before = Path.cwd()
    try:
        for start in (0, 20, 40, 10):
            cases = CaseRange(split="train", epoch=1, start=start, stop=start + 7)
            found = there[cases, np.arange(start, start + 7)]
            assert all(map(torch.equal, found, own.read(cases)))
        assert there[None] is None
    finally:
        os.chdir(before)  # a data process stays in the folder of the specification


def working_in(folder: Path) -> list[int]:
    """Return the processes whose working folder this is."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder):
                found.append(process.pid)
    return found


@pytest.mark.usefixtures("processes")
def test_augmented_data_do_not_depend_on_the_processes_that_read_them(tmp_path: Path) -> None:
    """Two actors with two data processes each do what one worker with one such process does."""
    jobs = Jobs(tmp_path)
    (tmp_path / "line.py").write_text(TASK + NOISY)
    values = line_spec(task="line.py:Noisy", steps=4)
    local = LocalJob(parse_spec(values | {"data": {"name": None, "num_workers": 1}}), tmp_path)
    local.steps(4)
    local.close()
    local.workers[0]._cases.close()
    values |= {"data": {"name": None, "num_workers": 2}, "workers": {"gradient": 2}}
    assert jobs.run(parse_spec(values)).state == "SUCCEEDED"
    wait_until(lambda: not working_in(tmp_path), "the end of all actors and data processes")
    saved = (jobs.checkpoint(4) / "parameter_server.safetensors").read_bytes()
    parameters = torch.from_numpy(load(saved)["parameters"])
    torch.testing.assert_close(parameters, local.parameters, rtol=1e-9, atol=1e-12)
