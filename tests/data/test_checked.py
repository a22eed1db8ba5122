"""What is checked before a job starts: a spread of cases, then as many as a few seconds allow."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor

from kfac_dist.core.passes.target_range import TargetRange
from kfac_dist.data import ArrayDataset, check_before_start, fetch_checked
from kfac_dist.data import checked as checked_module
from kfac_dist.errors import DataError


class Slow:
    """Cases that take a second each on the clock below; it notes which were read."""

    def __init__(self, clock: list[float], num_cases: int, bad: int | None = None) -> None:
        self.clock, self.num_cases, self.bad = clock, num_cases, bad
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.num_cases

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        self.clock[0] += 1.0
        self.read.append(index)
        return torch.zeros(2), math.nan if index == self.bad else 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("bad", [0, 4321, 4999])
def test_a_quick_data_set_is_checked_whole(bad: int) -> None:
    inputs = torch.zeros(5000, 3)
    assert check_before_start(ArrayDataset(inputs, torch.zeros(5000)), "train", 60.0).is_whole
    inputs[bad, 2] = math.inf
    with pytest.raises(DataError, match=f"train data, input of case {bad} at position 2 is inf"):
        check_before_start(ArrayDataset(inputs, torch.zeros(5000)), "train", 60.0)


def test_of_a_slow_data_set_a_spread_is_read_in_bounded_time(clock: list[float]) -> None:
    dataset = Slow(clock, 1000)
    found = check_before_start(dataset, "train", 20.0)
    assert {0, 999} <= set(dataset.read)
    assert len({index // 250 for index in dataset.read}) == 4
    assert not found.is_whole
    assert len(dataset.read) <= 21
    assert found.seconds_for_all == pytest.approx(1000, rel=0.2)


def test_however_slow_the_first_and_the_last_case_are_read(clock: list[float]) -> None:
    dataset = Slow(clock, 1000, bad=999)
    with pytest.raises(DataError, match="test data, target of case 999 is nan"):
        check_before_start(dataset, "test", 0.5)
    good = Slow(clock, 1000)
    check_before_start(good, "test", 0.5)
    assert good.read == [999, 0]


@pytest.mark.parametrize("num_cases", [1, 2, 3, 17])
def test_small_data_sets_are_whole(num_cases: int) -> None:
    dataset = ArrayDataset(torch.zeros(num_cases, 2), torch.zeros(num_cases))
    found = check_before_start(dataset, "train", 60.0)
    assert (found.num_checked, found.is_whole) == (num_cases, True)


def test_a_fetched_case_is_named_by_its_place_in_the_data_set() -> None:
    inputs = torch.zeros(10, 2)
    inputs[7, 1] = math.nan
    dataset = ArrayDataset(inputs, torch.zeros(10))
    fetch_checked(dataset, torch.tensor([3, 1]), "train")
    with pytest.raises(DataError, match="train data, input of case 7 at position 1 is nan"):
        fetch_checked(dataset, torch.tensor([3, 7, 1]), "train")


def test_large_finite_numbers_are_accepted_though_their_sum_overflows() -> None:
    inputs = torch.full((4, 2), 3e38)
    dataset = ArrayDataset(inputs, torch.zeros(4))
    assert torch.equal(fetch_checked(dataset, torch.arange(4), "train")[0], inputs)


def test_a_chunk_takes_a_fraction_of_a_second() -> None:
    assert checked_module._chunk(0.001) == 250
    assert checked_module._chunk(10.0) == 1
    assert checked_module._chunk(0.0) == checked_module._MAX_CHUNK


def test_labels_out_of_range_are_found_by_the_sample_and_by_every_later_read():
    labels = torch.arange(5000) % 10
    labels[4321] = 10
    dataset = ArrayDataset(torch.zeros(5000, 2), labels)
    allowed = TargetRange(lowest=0, highest=9, are_labels=True)
    message = r"train data, target of case 4321 is 10: it must be a class from 0 to 9"
    with pytest.raises(DataError, match=message):
        check_before_start(dataset, "train", 60.0, allowed)
    with pytest.raises(DataError, match=message):
        fetch_checked(dataset, torch.tensor([7, 4321, 3]), "train", allowed)
    fetch_checked(dataset, torch.arange(100), "train", allowed)


class Stream(ArrayDataset):
    """Cases that can only be read from the first on; it notes which were read."""

    is_stream = True

    def __init__(self, clock: list[float], num_cases: int) -> None:
        super().__init__(torch.zeros(num_cases, 2), torch.zeros(num_cases))
        self.clock = clock
        self.read: list[int] = []

    def gather_cases(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self.clock[0] += len(indices)
        self.read += indices.tolist()
        return super().gather_cases(indices)


@pytest.mark.parametrize("seconds", [0.5, 5.0, 2000.0])
def test_a_stream_is_read_once_from_its_start(clock: list[float], seconds: float) -> None:
    dataset = Stream(clock, 1000)
    found = check_before_start(dataset, "train", seconds)
    assert dataset.read == list(range(min(1000, math.ceil(seconds))))
    assert found.num_checked == len(dataset.read)
    assert found.is_whole == (seconds > 1000)
