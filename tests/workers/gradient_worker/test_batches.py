"""The cases that a worker computes on: together they never depend on the number of workers."""

from __future__ import annotations

import pytest
import torch

from kfac_dist.coordination.steps.sampling import BatchWindow
from kfac_dist.data import ArrayDataset
from kfac_dist.errors import DataError
from workers.gradient_worker.batches import BatchPart, BatchReader
from workers.gradient_worker.reading import PlainReader

DATA = ArrayDataset(torch.arange(40.0).unsqueeze(1), torch.arange(40))
CPU = torch.device("cpu")
WINDOW = BatchWindow(epoch=2, start=10, stop=27)


def parts(num_workers: int) -> list[BatchPart]:
    return [placed(rank, num_workers).read(WINDOW) for rank in range(num_workers)]


def placed(rank: int, num_workers: int) -> BatchReader:
    reader = BatchReader(PlainReader({"train": DATA}, seed=3), device=CPU)
    reader.place(rank, num_workers)
    return reader


@pytest.mark.parametrize("num_workers", [2, 3, 20])
def test_the_batch_does_not_depend_on_the_number_of_workers(num_workers):
    (whole,) = parts(1)
    assert len(whole.inputs) == 17
    shared = parts(num_workers)
    assert torch.equal(torch.cat([part.targets for part in shared]), whole.targets)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.125])
@pytest.mark.parametrize("num_workers", [2, 3, 20])
def test_a_subset_of_the_batch_does_not_either(num_workers, fraction):
    (whole,) = parts(1)
    expected = whole.subset(fraction)
    chosen, row = [], 0
    for part in parts(num_workers):
        own = part.subset(fraction)
        assert own.first_row == row
        row += len(own.positions)
        chosen.append(own.select(part.targets))
    assert row == len(expected.positions)
    assert torch.equal(torch.cat(chosen), expected.select(whole.targets))


def test_a_reader_may_take_another_place() -> None:
    reader = placed(0, 2)
    assert reader.read(WINDOW).slice == range(9)
    reader.place(2, 3)
    moved = reader.read(WINDOW)
    assert moved.slice == parts(3)[2].slice
    assert torch.equal(moved.targets, parts(3)[2].targets)
    assert moved.subset(0.5) == parts(3)[2].subset(0.5)


def test_a_case_that_cannot_be_used_is_named_when_it_is_read() -> None:
    inputs = torch.zeros(40, 1)
    inputs[23] = float("inf")
    data = ArrayDataset(inputs, torch.arange(40))
    reader = BatchReader(PlainReader({"train": data}, seed=3), device=CPU)
    reader.place(0, 1)
    with pytest.raises(DataError, match="train data, input of case 23 at position 0 is inf"):
        reader.read(BatchWindow(epoch=0, start=0, stop=40))
