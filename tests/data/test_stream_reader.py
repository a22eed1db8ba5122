"""Positions of a stream are the same cases for every reader, whatever was read before."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from kfac_dist.data import StreamReader
from kfac_dist.errors import DataError


class Shuffled:
    """Numbers in an order that it draws for each pass; it counts passes and cases."""

    def __init__(self, num_cases: int = 20) -> None:
        self.num_cases = num_cases
        self.num_passes = 0
        self.num_read = 0

    def __iter__(self) -> Iterator[float]:
        self.num_passes += 1
        order = list(range(self.num_cases))
        random.shuffle(order)
        for number in order:
            self.num_read += 1
            yield number + random.random()


def reader(cases: Shuffled, num_cases: int = 20) -> StreamReader:
    return StreamReader(cases, num_cases=num_cases, seed=4, name="train_data()")


def test_readers_of_parts_see_together_what_one_reader_sees():
    whole = reader(Shuffled()).read(0, 0, 20)
    parts = [reader(Shuffled()) for _ in range(2)]
    seen: list[float] = []
    for start in range(0, 20, 4):  # batches of four, two cases for each reader
        random.random()  # other draws of the process do not matter
        seen += parts[0].read(0, start, start + 2) + parts[1].read(0, start + 2, start + 4)
    assert seen == whole
    assert sorted(map(int, whole)) == list(range(20))
    assert reader(Shuffled()).read(1, 0, 20) != whole


def test_going_on_reads_no_case_twice_and_going_back_begins_a_pass():
    cases = Shuffled()
    own = reader(cases)
    whole = own.read(0, 0, 20)
    assert own.read(0, 5, 9) == whole[5:9]
    assert (cases.num_passes, cases.num_read) == (2, 29)
    assert own.read(0, 12, 13) == whole[12:13]
    assert (cases.num_passes, cases.num_read) == (2, 33)


def test_an_evaluation_has_a_pass_of_its_own():
    cases = Shuffled()
    own = reader(cases)
    own.read(0, 0, 8)
    first = own.read(None, 0, 20)
    assert own.read(0, 8, 10) == reader(Shuffled()).read(0, 8, 10)
    assert cases.num_passes == 2
    assert own.read(None, 0, 20) == first


def test_data_that_end_too_early_are_refused():
    message = r"train_data\(\) ended after 20 cases, but its __len__ says 25"
    with pytest.raises(DataError, match=message):
        reader(Shuffled(), num_cases=25).read(0, 18, 22)
