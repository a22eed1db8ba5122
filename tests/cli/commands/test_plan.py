"""`kfac-dist plan`: the assignment of layers, and the predicted memory and times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import KfacDist

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
        "gradient_worker",
        "inverse_worker",
        "parameter_server",
    ]
    assert [row["processes"] for row in plan["placement"]] == [2, 2, 1]
    assert all(row["memory_bytes_each"] > 4 * plan["num_parameters"] for row in plan["placement"])
    orders = {row["layer"]: row["orders"] for row in plan["layers"]}
    assert orders["encoder1"] == [785, 24]
    assert {row["inverse_worker"] for row in plan["layers"]} == {0, 1}
    assert plan["predicted"]["step_seconds"] > 0
    assert plan["predicted"]["refresh_seconds"] > 0
    assert plan["predicted"]["staleness_max"] >= plan["predicted"]["staleness_mean"]
    table = kfac_dist("plan", small).out
    assert "encoder1" in table
    assert "refresh_seconds" in table


def test_a_baseline_has_no_layers(kfac_dist: KfacDist, small: Path) -> None:
    done = kfac_dist("plan", small, "--set", "optimizer={name: sgd, lr: 0.1}", "-o", "json")
    plan = json.loads(done.out)
    assert plan["layers"] == []
    assert plan["predicted"]["refresh_seconds"] is None
    assert [row["processes"] for row in plan["placement"]] == [2, 0, 1]


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
    for command in (("plan", path), ("train", path, "--dry-run")):
        done = kfac_dist(*command)
        assert (done.code, done.out) == (1, "")
        assert done.err == (
            "error: train data, target of case 31 is 4: it must be a class from 0 to 3, or -100 "
            "to be left out\n"
        )
    assert kfac_dist("plan", path, "--set", "task_args.label=-100").code == 0
