"""Layers of every kind: a distributed run agrees with the serial optimizer."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from tests.workers.whole_jobs.local_job import LocalJob, user_spec
from tests.workers.whole_jobs.test_distributed_is_serial import (
    assert_bitwise_serial,
    assert_serial_to_rounding,
)

TASK = '''\
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Sums:
    """Classifies sequences of seven symbols by their sum modulo 3."""

    distribution = "categorical"

    def model(self):
        return Net()

    def train_data(self, data_dir):
        symbols = torch.randint(0, 7, (120, 8), generator=torch.Generator().manual_seed(1))
        return TensorDataset(symbols, symbols.sum(dim=1) % 3)

    def test_data(self, data_dir):
        return self.train_data(data_dir)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.symbols = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.groups = nn.GroupNorm(2, 4)
        self.hidden = nn.Linear(32, 5)
        self.qkv = nn.Linear(5, 6)
        self.output = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, symbols):
        maps = self.conv(self.norm(self.symbols(symbols)).transpose(1, 2))
        hidden = torch.tanh(self.hidden(torch.tanh(self.groups(maps)).flatten(1)))
        return self.output(torch.tanh(self.qkv(hidden))) * self.scale
'''


NORMALISED = TASK.replace("Sums", "Normalised").replace(
    "return Net()", "return nn.Sequential(Net(), nn.BatchNorm1d(3), nn.Linear(3, 3))"
)


@pytest.mark.parametrize(("num_workers", "batch_size"), [(1, 8), (3, 16)])
def test_a_small_batch_is_enough_for_a_batch_norm(
    num_workers: int, batch_size: int, tmp_path: Path
) -> None:
    optimizer = {"statistics_fraction": 0.125, "fisher_fraction": 0.125}
    workers = {"gradient": num_workers, "inverse": 1}
    changes = {"optimizer": optimizer, "workers": workers, "batch_size": batch_size}
    spec = user_spec(tmp_path, NORMALISED, "Normalised", **changes)
    with closing(LocalJob(spec, tmp_path)) as job:
        if num_workers == 1:
            assert_bitwise_serial(job, spec, tmp_path)
            return
        reports = job.steps(3)
        assert all(report.applied for report in reports)
        assert not any(report.refused_in_a_row for report in reports)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal", "ekfac"])
def test_a_distributed_run_agrees_with_the_serial_optimizer(
    inverse: str, num_workers: int, tmp_path: Path
) -> None:
    workers = {"gradient": num_workers, "inverse": 2}
    spec = user_spec(tmp_path, TASK, "Sums", optimizer={"inverse": inverse}, workers=workers)
    check = assert_bitwise_serial if num_workers == 1 else assert_serial_to_rounding
    with closing(LocalJob(spec, tmp_path)) as job:
        check(job, spec, tmp_path)


PADDED = '''\
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Parities:
    """Labels each of six symbols by its parity; the last ones of a sequence are left out."""

    distribution = "categorical"

    def model(self):
        return SequenceFirst()

    def train_data(self, data_dir):
        generator = torch.Generator().manual_seed(1)
        symbols = torch.randint(0, 7, (120, 6), generator=generator)
        lengths = torch.randint(0, 7, (120, 1), generator=generator)
        labels = (symbols % 2).masked_fill(torch.arange(6) >= lengths, -100)
        return TensorDataset(symbols, labels)

    def test_data(self, data_dir):
        return self.train_data(data_dir)


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.symbols = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.output = nn.Linear(6, 2)

    def forward(self, symbols):
        return self.output(torch.tanh(self.norm(self.symbols(symbols.T)))).transpose(0, 1)
'''


@pytest.mark.parametrize("num_workers", [1, 2])
def test_padded_sequences_in_a_sequence_first_model_agree_with_the_serial_optimizer(
    num_workers: int, tmp_path: Path
) -> None:
    workers = {"gradient": num_workers, "inverse": 1}
    spec = user_spec(tmp_path, PADDED, "Parities", optimizer={"inverse": "ekfac"}, workers=workers)
    check = assert_bitwise_serial if num_workers == 1 else assert_serial_to_rounding
    with closing(LocalJob(spec, tmp_path)) as job:
        check(job, spec, tmp_path)
