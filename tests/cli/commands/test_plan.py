"""`kfac-dist plan`: the assignment of layers, and the predicted memory and times."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kfac_dist.cli.commands.plan import _warnings
from kfac_dist.config import parse_spec
from tests.cli.conftest import KfacDist
from workers.driver.job_plan import _predicted

SMALL = """\
name: small
task: autoencoder
task_args: {hidden: [24, 8]}
data: {name: mnist-5k, limit: 200}
steps: 10
batch_size: 100
optimizer: {name: kfac, max_factor_dim: null}
workers: {gradient: 2, inverse: 2}
"""

LARGE = """\
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Large:
    distribution = "gaussian"

    def model(self):
        return nn.Linear(1024, 1)

    def train_data(self, data_dir):
        return TensorDataset(torch.ones(2**15, 1024), torch.ones(2**15, 1))

    def test_data(self, data_dir):
        return TensorDataset(torch.ones(8, 1024), torch.ones(8, 1))
"""


MAPPED = """
name: mapped
task: autoencoder
task_args: {hidden: [2]}
data: {name: npz, num_workers: 3}
workers: {gradient: 2}
steps: 1
batch_size: 8
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_every_layer_has_an_owner_and_every_role_its_memory(
    kfac_dist: KfacDist, small: Path
) -> None:
    done = kfac_dist("plan", small, "-o", "json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert [row["role"] for row in plan["placement"]] == [
        "driver",
        "gradient_worker",
        "inverse_worker",
        "parameter_server",
    ]
    assert [row["processes"] for row in plan["placement"]] == [1, 2, 2, 1]
    assert [row["shards_each"] for row in plan["placement"]] == [0, 0, 0, 1]
    # Python, torch and Ray alone are more than this in every process.
    assert all(row["memory_bytes_each"] > 200 * 2**20 for row in plan["placement"])
    total = sum(row["processes"] * row["memory_bytes_each"] for row in plan["placement"])
    machine = plan["machine"]
    assert machine["memory_bytes_needed"] == total + machine["memory_bytes_shared"]
    orders = {row["layer"]: row["orders"] for row in plan["layers"]}
    assert orders["encoder1"] == [785, 24]
    assert {row["inverse_worker"] for row in plan["layers"]} == {0, 1}
    assert plan["predicted"]["step_seconds"] > 0
    assert plan["predicted"]["refresh_seconds"] > 0
    assert plan["predicted"]["staleness_max"] >= plan["predicted"]["staleness_mean"]
    table = kfac_dist("plan", small).out
    assert "encoder1" in table
    assert "refresh_seconds" in table


def test_shards_beside_gradient_workers_are_part_of_them(kfac_dist: KfacDist, small: Path) -> None:
    found = []
    for shards in ("auto", "3"):
        options = ("workers.gradient=3", f"workers.parameter_server={shards}")
        done = kfac_dist("plan", small, *(w for o in options for w in ("--set", o)), "-o", "json")
        assert done.code == 0, done.err
        plan = json.loads(done.out)
        found.append({row["role"]: row for row in plan["placement"]})
    beside, alone = found
    assert (beside["gradient_worker"]["processes"], beside["gradient_worker"]["shards_each"]) == (
        3,
        1,
    )
    assert (beside["parameter_server"]["processes"], alone["parameter_server"]["processes"]) == (
        0,
        3,
    )
    assert beside["parameter_server"]["memory_bytes_each"] == 0
    received = [
        alone[role]["received_bytes_each"] for role in ("gradient_worker", "parameter_server")
    ]
    assert beside["gradient_worker"]["received_bytes_each"] == sum(received)
    parameters = 4 * plan["num_parameters"]
    assert received[0] > parameters, "the direction, and parts of statistics"
    # Three gradients, in slices of a third if the layers were of one size.
    assert parameters <= received[1] <= 3 * parameters


def test_a_baseline_has_no_layers(kfac_dist: KfacDist, small: Path) -> None:
    done = kfac_dist("plan", small, "--set", "optimizer={name: sgd, lr: 0.1}", "-o", "json")
    plan = json.loads(done.out)
    assert plan["layers"] == []
    assert plan["predicted"]["refresh_seconds"] is None
    assert [row["processes"] for row in plan["placement"]] == [1, 2, 0, 1]


def test_a_data_set_is_counted_in_each_process_that_holds_it(
    kfac_dist: KfacDist, tmp_path: Path
) -> None:
    (tmp_path / "large.py").write_text(LARGE)
    path = tmp_path / "large.yaml"
    path.write_text("name: large\ntask: large.py:Large\nsteps: 1\nbatch_size: 8\n")
    done = kfac_dist("plan", path, "-o", "json")
    assert done.code == 0, done.err
    rows = {row["role"]: row["memory_bytes_each"] for row in json.loads(done.out)["placement"]}
    for role in ("driver", "gradient_worker"):
        assert rows[role] - rows["parameter_server"] > 0.8 * 128 * 2**20


def test_a_data_set_that_is_mapped_is_counted_once(kfac_dist: KfacDist, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = {f"x_{split}": generator.random((4000, 4096), np.float32) for split in ("train", "test")}
    np.savez(tmp_path / "data.npz", **rows)
    path = tmp_path / "mapped.yaml"
    path.write_text(MAPPED)
    done = kfac_dist("plan", path, "--data-dir", tmp_path, "-o", "json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    size = sum(array.nbytes for array in rows.values())
    assert 0.9 * size < plan["machine"]["memory_bytes_shared"] < 2 * size
    rows = {row["role"]: row for row in plan["placement"]}
    assert (rows["data_process"]["processes"], rows["gradient_worker"]["processes"]) == (6, 2)
    difference = rows["driver"]["memory_bytes_each"] - rows["parameter_server"]["memory_bytes_each"]
    assert difference < 0.3 * size


def test_a_busy_machine_and_too_little_memory_are_said() -> None:
    idle = {"cpus": 4, "load": 1.0, "memory_bytes_available": 9, "memory_bytes_needed": 9}
    assert list(_warnings(idle)) == []
    (busy,) = _warnings(idle | {"load": 3.8})
    assert "load 3.8 on 4 CPUs" in busy
    (full,) = _warnings(idle | {"memory_bytes_needed": 3 * 2**30})
    assert "need 3,072 MiB together" in full


def test_workers_that_share_the_cores_take_longer() -> None:
    def step(num_workers: int, num_cpus: int) -> float:
        spec = parse_spec(
            {
                "name": "a",
                "task": "classifier",
                "steps": 1,
                "batch_size": 9,
                "workers": {"gradient": num_workers},
            }
        )
        return float(_predicted(spec, 2.0, [], num_cpus)["step_seconds"] or 0)

    assert step(1, 4) == 2.0
    assert step(3, 4) == 2.0  # with the server, four threads on four cores
    assert step(7, 4) == 4.0


TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Labels:
    distribution = "categorical"

    def __init__(self, label):
        self.label = label

    def model(self):
        return nn.Linear(3, 4)

    def train_data(self, data_dir):
        targets = torch.arange(40) % 4
        targets[31] = self.label
        return TensorDataset(torch.zeros(40, 3), targets)

    def test_data(self, data_dir):
        return TensorDataset(torch.zeros(40, 3), torch.arange(40) % 4)
"""


def test_a_label_out_of_range_is_named_by_every_check_of_the_data(
    kfac_dist: KfacDist, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    path = tmp_path / "labels.yaml"
    path.write_text(
        "{name: labels, task: 'mine.py:Labels', task_args: {label: 4}, steps: 2, batch_size: 8}"
    )
    for command in (("plan", path), ("validate", path), ("train", path, "--dry-run")):
        done = kfac_dist(*command)
        assert (done.code, done.out) == (1, "")
        assert done.err == (
            "error: train data, target of case 31 is 4: it must be a class from 0 to 3, or -100 "
            "to be left out\n"
        )
    assert kfac_dist("plan", path, "--set", "task_args.label=-100").code == 0
