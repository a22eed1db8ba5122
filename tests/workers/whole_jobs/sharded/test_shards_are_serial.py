"""The number of shards changes no bit: one, two or four of them equal the serial optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_dist.config import JobSpec
from kfac_dist.core.vector import flatten
from tests.workers.whole_jobs.local_job import LocalJob, small_spec, user_spec
from tests.workers.whole_jobs.test_blocks_of_every_kind import TASK
from tests.workers.whole_jobs.test_distributed_is_serial import serial_run
from tests.workers.whole_jobs.test_scripted_delays import scripted_spec

STEPS = 20
SHARDS = (1, 2, 4)
CONSTRAINED = {"step_rule": "norm_constraint", "norm_constraint": 0.01}
CASES: dict[str, dict[str, Any]] = {
    "block_diagonal": {"l2": 0.0},
    "block_diagonal_constrained": {"l2": 1e-3, **CONSTRAINED},
    "block_tridiagonal": {"inverse": "block_tridiagonal", "l2": 1e-3},
    "block_tridiagonal_constrained": {"inverse": "block_tridiagonal", "l2": 0.0, **CONSTRAINED},
    "ekfac": {"inverse": "ekfac", "l2": 1e-3},
    "ekfac_constrained": {"inverse": "ekfac", "l2": 0.0, **CONSTRAINED},
}


class Runner:
    """Runs jobs on a model that has linked layers and others."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def spec(self, optimizer: dict[str, Any], **workers: Any) -> JobSpec:
        return user_spec(self._folder, TASK, "Sums", optimizer=optimizer, workers=workers)

    def run(self, spec: JobSpec, num_steps: int = STEPS) -> tuple[Tensor, list[Any], int]:
        """Return parameters, what was decided in each step, and the number of shards."""
        job = LocalJob(spec, self._folder)
        try:
            reports = job.steps(num_steps)
            shards = tuple(built.shard.checksum() for built in job.shards)
            assert {worker.checksums() for worker in job.workers} == {shards}
            return job.parameters.clone(), [decided(report) for report in reports], len(job.plan)
        finally:
            job.close()

    def serial(self, spec: JobSpec, **more: Any) -> tuple[Tensor, list[Any]]:
        optimizer, results = serial_run(spec, self._folder, STEPS, **more)
        return flatten(optimizer._parameters), [decided(result) for result in results]


def decided(report: Any) -> tuple[Any, ...]:
    names = ("loss", "objective", "damping", "gamma", "lr", "reduction_ratio", "update_norm")
    return tuple(getattr(report, name) for name in names)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_one_gradient_worker_with_any_number_of_shards_equals_the_serial_optimizer(
    case: str, runner: Runner
) -> None:
    optimizer = CASES[case]
    theta, results = runner.serial(runner.spec(optimizer))
    for count in SHARDS:
        spec = runner.spec(optimizer, gradient=1, inverse=2, parameter_server=count)
        parameters, found, num_shards = runner.run(spec)
        assert num_shards == count
        assert found == results
        assert torch.equal(parameters, theta)


@pytest.mark.parametrize(
    ("num_workers", "case", "shards"),
    [
        (2, "block_tridiagonal", ("auto", 4)),
        (3, "ekfac", (1, "auto")),
        (4, "block_diagonal", (2, "auto")),
    ],
)
def test_more_gradient_workers_equal_it_to_rounding_and_each_other_to_the_bit(
    num_workers: int, case: str, shards: tuple[Any, ...], runner: Runner
) -> None:
    theta, _ = runner.serial(runner.spec(CASES[case]))
    runs = []
    for count in shards:
        spec = runner.spec(CASES[case], gradient=num_workers, parameter_server=count)
        runs.append(runner.run(spec))
        error = torch.linalg.vector_norm(runs[-1][0] - theta)
        assert error <= 1e-9 * torch.linalg.vector_norm(theta)
    expected = {"auto": 1 if num_workers <= 2 else num_workers}
    assert [run[2] for run in runs] == [expected.get(count, count) for count in shards]
    assert runs[0][1] == runs[1][1]
    assert torch.equal(runs[0][0], runs[1][0])


@pytest.mark.parametrize("inverse", ["block_diagonal", "ekfac"])
def test_scripted_delays_with_shards_equal_the_serial_simulation(
    inverse: str, runner: Runner, tmp_path: Path
) -> None:
    delays = {"*": 9, "2": 2, "[34]": 5}
    spec = scripted_spec(inverse, delays, workers={"inverse": 2, "parameter_server": 3})
    parameters, found, num_shards = runner.run(spec)
    theta, results = runner.serial(spec, delay_steps=delays)
    assert num_shards == 3
    assert found == results
    assert torch.equal(parameters, theta)


def test_products_in_bfloat16_do_not_depend_on_the_number_of_shards(runner: Runner) -> None:
    runs = []
    for count in (1, 3):
        spec = small_spec(
            dtype="float32",
            optimizer={"precondition_dtype": "bfloat16"},
            workers={"parameter_server": count},
        )
        runs.append(runner.run(spec, 8))
    assert runs[0][:2] == (pytest.approx(runs[1][0], abs=0.0), runs[1][1])


WIDE = '''\
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Wide:
    """A model with more parameters than three shards of a first-order optimizer hold."""

    distribution = "gaussian"

    def model(self):
        return nn.Sequential(nn.Linear(400, 500), nn.Tanh(), nn.Linear(500, 3))

    def train_data(self, data_dir):
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(40, 400, generator=generator)
        return TensorDataset(inputs, inputs[:, :3])

    def test_data(self, data_dir):
        return self.train_data(data_dir)
'''


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "sgd", "lr": 0.01, "momentum": 0.9, "l2": 1e-3},
        {"name": "adam", "lr": 0.01, "averaging": {"decay": 0.9, "start": 2}},
    ],
    ids=["sgd", "adam"],
)
def test_first_order_optimizers_do_not_depend_on_the_number_of_shards(
    optimizer: dict[str, Any], runner: Runner, tmp_path: Path
) -> None:
    runs = []
    for count in SHARDS:
        spec = user_spec(tmp_path, WIDE, "Wide", workers={"parameter_server": count})
        values = spec.model_dump() | {"optimizer": optimizer}
        runs.append(runner.run(JobSpec.model_validate(values), 6))
    assert [run[2] for run in runs] == list(SHARDS)
    for parameters, found, _ in runs[1:]:
        assert torch.equal(parameters, runs[0][0])
        assert found == runs[0][1]
