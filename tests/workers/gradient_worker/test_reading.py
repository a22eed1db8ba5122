"""What is read does not depend on what was read ahead, nor on when."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kfac_dist.coordination.steps.sampling import BatchWindow, SamplerCursor, next_window
from kfac_dist.data import ArrayDataset
from kfac_dist.errors import DataError
from workers.gradient_worker import reading
from workers.gradient_worker.batches import BatchReader
from workers.gradient_worker.reading import CaseRange, PlainReader, ThreadReader

NUM_CASES = 60


class Recorded(ArrayDataset):
    """Notes what is read, and by which thread; a read may be made to wait."""

    def __init__(self) -> None:
        super().__init__(torch.arange(float(NUM_CASES)).unsqueeze(1), torch.arange(NUM_CASES))
        self.read: list[tuple[list[int], str]] = []
        self.may_read = threading.Event()
        self.may_read.set()

    def gather_cases(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self.may_read.wait(20)
        self.read.append((indices.tolist(), threading.current_thread().name))
        return super().gather_cases(indices)


def training(start: int, stop: int, epoch: int = 0) -> CaseRange:
    return CaseRange(split="train", epoch=epoch, start=start, stop=stop)


def evaluation(start: int, stop: int) -> CaseRange:
    return CaseRange(split="test", epoch=None, start=start, stop=stop)


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def dataset() -> Recorded:
    return Recorded()


@pytest.fixture
def reader(dataset: Recorded):
    reader = ThreadReader({"train": dataset, "test": dataset}, seed=3)
    yield reader
    dataset.may_read.set()
    reader.close()


def test_whatever_was_guessed_and_however_late_the_cases_are_those_asked_for(dataset, reader):
    plain = PlainReader({"train": Recorded(), "test": Recorded()}, seed=3)
    choose = random.Random(5)

    def anything() -> CaseRange:
        start = choose.randrange(NUM_CASES)
        stop = choose.randrange(start + 1, NUM_CASES + 1)
        return choose.choice([training(start, stop, choose.randrange(3)), evaluation(start, stop)])

    asked = [anything() for _ in range(60)]
    for place, cases in enumerate(asked):
        coming = [anything() for _ in range(choose.randrange(3))] + asked[place + 1 : place + 2]
        for found, expected in zip(reader.read(cases, coming), plain.read(cases), strict=True):
            assert torch.equal(found, expected)


def test_the_next_cases_are_read_beside_the_step(dataset, reader):
    reader.read(training(0, 5), [training(5, 10), training(10, 15)])
    until(lambda: len(dataset.read) == 3)
    dataset.may_read.clear()  # from now on only what is there already can be had
    assert len(reader.read(training(5, 10), [training(10, 15)])[0]) == 5
    assert len(reader.read(training(10, 15))[0]) == 5
    assert {thread.partition("_")[0] for _, thread in dataset.read} == {"data"}


def test_an_evaluation_does_not_cost_what_was_read_for_the_next_step(dataset, reader):
    reader.read(training(0, 5), [training(5, 10)])
    reader.read(evaluation(0, 20), [evaluation(20, 40)])
    reader.read(evaluation(20, 40))
    dataset.may_read.clear()
    assert len(reader.read(training(5, 10))[0]) == 5


def test_what_is_bad_ahead_is_said_when_it_is_asked_for(dataset, reader):
    dataset.inputs[17] = float("nan")
    reader.read(evaluation(0, 10), [evaluation(10, 20)])
    with pytest.raises(DataError, match="test data, input of case 17 at position 0 is nan"):
        reader.read(evaluation(10, 20))


def test_pieces_cover_a_range_in_order():
    assert [(p.start, p.stop) for p in training(10, 20).pieces(3)] == [(10, 13), (13, 16), (16, 20)]
    assert [(p.start, p.stop) for p in training(0, 2).pieces(5)] == [(0, 1), (1, 2)]


class Asked(PlainReader):
    """Notes what is asked for, and what is announced."""

    def __init__(self) -> None:
        super().__init__({"train": Recorded()}, seed=3)
        self.last: tuple[CaseRange, list[CaseRange]]

    def read(self, cases, coming=()):
        self.last = (cases, list(coming))
        return super().read(cases)


def batch_reader(cases: Asked, rank: int = 0) -> BatchReader:
    reader = BatchReader(cases, device=torch.device("cpu"), prefetch_batches=2)
    reader.place(rank, 2)
    return reader


@pytest.mark.parametrize("rank", [0, 1])
def test_the_batches_that_follow_are_guessed_over_the_end_of_an_epoch(rank):
    asked = Asked()
    reader = batch_reader(asked, rank)
    cursor, announced = SamplerCursor(epoch=0, offset=0), None
    for _ in range(12):
        window, cursor = next_window(cursor, 25, NUM_CASES)
        reader.read(window)
        cases, coming = asked.last
        assert announced is None or announced == cases
        announced = coming[0]
        assert len(coming) == 2


def test_batches_that_are_expected_are_read_ahead_instead():
    asked = Asked()
    reader = batch_reader(asked)
    windows = [BatchWindow(epoch=0, start=0, stop=2 * n) for n in range(3, 8)]
    reader.expect(windows)
    for place, window in enumerate(windows[:-1]):
        reader.read(window)
        expected = [each.size // 2 for each in windows[place + 1 :]][:2]
        assert [case.stop for case in asked.last[1]] == expected
    reader.read(windows[-1])
    assert asked.last[1] == []  # the size has changed all the time, so nothing is guessed
    reader.expect(windows)
    reader.read(windows[2])  # a step that was not expected next leaves out those before
    assert [case.stop for case in asked.last[1]] == [windows[3].size // 2, windows[4].size // 2]


def test_the_order_of_many_cases_is_in_a_file_that_ends_with_it(dataset, tmp_path, monkeypatch):
    held = PlainReader({"train": dataset}, seed=3)
    monkeypatch.setattr(reading, "_MANY_CASES", NUM_CASES)
    mapped = PlainReader({"train": dataset}, seed=3, folder=tmp_path / "cache")
    for epoch in (0, 1):
        cases = training(7, 44, epoch)
        assert torch.equal(mapped._order.indices(cases), held._order.indices(cases))
        assert mapped._order._orders[epoch].untyped_storage().filename is not None
    assert ".order-" in Path("/proc/self/maps").read_text()
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(
        os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    full = PlainReader({"train": dataset}, seed=3, folder=tmp_path / "cache")
    assert torch.equal(full._order.indices(cases), held._order.indices(cases))
    assert not list((tmp_path / "cache").iterdir())


def test_an_order_is_kept_for_this_epoch_and_the_next(dataset):
    reader = PlainReader({"train": dataset}, seed=3)
    for epoch in range(5):
        reader.read(training(0, 1, epoch))
        assert len(reader._order._orders) <= 2
