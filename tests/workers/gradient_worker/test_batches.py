"""Which cases a worker computes on: together always the same, whoever computes."""

from __future__ import annotations

import pytest
import torch

from kfac_dist.coordination.steps.sampling import BatchWindow
from kfac_dist.data import ArrayDataset
from workers.gradient_worker.batches import BatchPart, BatchReader

DATA = ArrayDataset(torch.arange(40.0).unsqueeze(1), torch.arange(40))
WINDOW = BatchWindow(epoch=2, start=10, stop=27)


def parts(num_shards: int) -> list[BatchPart]:
    readers = [
        BatchReader(DATA, seed=3, num_shards=num_shards, rank=rank, device=torch.device("cpu"))
        for rank in range(num_shards)
    ]
    return [reader.read(WINDOW) for reader in readers]


@pytest.mark.parametrize("num_shards", [2, 3, 20])
def test_the_batch_does_not_depend_on_the_number_of_workers(num_shards):
    (whole,) = parts(1)
    assert len(whole.inputs) == 17
    shared = parts(num_shards)
    assert torch.equal(torch.cat([part.targets for part in shared]), whole.targets)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.125])
@pytest.mark.parametrize("num_shards", [2, 3, 20])
def test_neither_does_a_subset_of_it(num_shards, fraction):
    (whole,) = parts(1)
    expected = whole.subset(fraction)
    taken, row = [], 0
    for part in parts(num_shards):
        own = part.subset(fraction)
        assert own.num_total == len(expected.positions)
        assert own.first_row == row
        row += len(own.positions)
        taken.append(own.take(part.targets))
    assert torch.equal(torch.cat(taken), expected.take(whole.targets))
