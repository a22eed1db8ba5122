"""Reads chosen cases, and reads ahead what is wanted next, beside the step.

What is read does not depend on what was read ahead: a wrong guess only costs time.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from kfac_dist.core.passes.noise import permutation
from kfac_dist.core.passes.target_range import TargetRange
from kfac_dist.data import BatchedDataset, MapDataset, Split, check_cases, fetch
from kfac_dist.tasks import UserDataset

_MANY_CASES = 2**20  # whose order takes 8 MiB

Pair = tuple[Tensor, Tensor]
"""Inputs and targets, stacked."""


@dataclass(frozen=True, kw_only=True)
class CaseRange:
    """Positions `start` to `stop` (exclusive) in a pass over a split.

    `epoch` is that of the training, which has an order of its own. Evaluations, with None, go
    through the data set in its own order.
    """

    split: Split
    epoch: int | None
    start: int
    stop: int

    def pieces(self, count: int) -> list[CaseRange]:
        """Return up to `count` ranges, of about the same size, that are this one together."""
        bounds = [self.start + (self.stop - self.start) * i // count for i in range(count + 1)]
        return [
            CaseRange(split=self.split, epoch=self.epoch, start=start, stop=stop)
            for start, stop in pairwise(bounds)
            if start < stop
        ]


class CaseOrder:
    """Which cases are at the positions of a pass.

    Only the orders of the two newest epochs are kept. An order takes 8 bytes a case: in memory, or
    of many cases in a file in `folder`.
    """

    def __init__(self, data: Mapping[Split, MapDataset], seed: int, folder: Path | None) -> None:
        self._data = data
        self._seed = seed
        self._folder = folder
        self._orders: dict[int, Tensor] = {}

    def indices(self, cases: CaseRange) -> Tensor:
        """Return the indices of cases in their data set, int64 `[n]`."""
        dataset = self._data[cases.split]
        is_stream = isinstance(dataset, BatchedDataset) and dataset.is_stream
        if cases.epoch is None or is_stream:
            return torch.arange(cases.start, cases.stop)
        return self._order(cases.epoch, len(dataset))[cases.start : cases.stop]

    def _order(self, epoch: int, num_cases: int) -> Tensor:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if abs(e - epoch) == 1}
            out = None
            if self._folder is not None and num_cases >= _MANY_CASES:
                out = _numbers_in_file(self._folder, num_cases)
            self._orders[epoch] = permutation(self._seed, epoch, num_cases, out)
        return self._orders[epoch]


def _numbers_in_file(folder: Path, count: int) -> Tensor | None:
    """Return `count` int64 numbers in a file that ends with them; None if there is no room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".order-") as file:
            # A mapped file without room for it would end the process when it is written to.
            os.posix_fallocate(file.fileno(), 0, 8 * count)
            return torch.from_file(file.name, shared=True, size=count, dtype=torch.int64)
    except OSError:
        return None


def read_cases(
    dataset: MapDataset,
    cases: CaseRange,
    indices: Tensor,
    allowed: TargetRange | None,
    seed: int | None = None,
) -> Pair:
    """Return the cases, checked.

    With a `seed`, what a user's data set draws for a case depends on seed, epoch and case alone.

    Raises:
        DataError: a value cannot be used, as `check_cases` has it.
        UserTaskError: the user's data set raised.
    """
    if isinstance(dataset, UserDataset):
        inputs, targets = dataset.read(indices, cases.epoch, seed)
    else:
        inputs, targets = fetch(dataset, indices)
    check_cases(inputs, targets, indices, cases.split, allowed)
    return inputs, targets


class CaseReader(ABC):
    """Reads cases of the two data sets of a task."""

    def __init__(
        self,
        data: Mapping[Split, MapDataset],
        *,
        seed: int,
        allowed: TargetRange | None = None,
        folder: Path | None = None,
    ) -> None:
        """Store the arguments.

        Args:
            data: the data sets.
            seed: of the job.
            allowed: the targets that the model's outputs allow, None if all are possible.
            folder: for what is too large to be held; None holds everything.
        """
        self._data = data
        self._allowed = allowed
        self._order = CaseOrder(data, seed, folder)

    def num_cases(self, split: Split) -> int:
        """Return the number of cases of a split."""
        return len(self._data[split])

    @abstractmethod
    def read(self, cases: CaseRange, coming: Sequence[CaseRange] = ()) -> Pair:
        """Return the cases in this range; errors are those of `read_cases`.

        `coming` will probably be asked for next, in this order.
        """

    @abstractmethod
    def close(self) -> None:
        """End what reads ahead; nothing is read after that."""


class PlainReader(CaseReader):
    """Reads when it is asked: a user's data set may not bear two threads in its process."""

    def read(self, cases: CaseRange, coming: Sequence[CaseRange] = ()) -> Pair:
        """Return the cases; nothing is read ahead."""
        indices = self._order.indices(cases)
        return read_cases(self._data[cases.split], cases, indices, self._allowed)

    def close(self) -> None:
        """Do nothing: there is nothing to end."""


class ThreadReader(CaseReader):
    """Reads ahead in a thread of its own, for data sets that are safe to read there."""

    def __init__(
        self,
        data: Mapping[Split, MapDataset],
        *,
        seed: int,
        allowed: TargetRange | None = None,
        folder: Path | None = None,
    ) -> None:
        """Start no thread yet."""
        super().__init__(data, seed=seed, allowed=allowed, folder=folder)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._ahead: dict[CaseRange, Future[Pair]] = {}

    def read(self, cases: CaseRange, coming: Sequence[CaseRange] = ()) -> Pair:
        """Return the cases; those to come are read while the caller computes."""
        wanted = [cases, *coming]
        for other in unwanted(self._ahead, wanted):
            self._ahead.pop(other).cancel()
        for each in wanted:
            if each not in self._ahead:
                indices = self._order.indices(each)
                self._ahead[each] = self._thread.submit(
                    read_cases, self._data[each.split], each, indices, self._allowed
                )
        return self._ahead.pop(cases).result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def unwanted(ahead: Iterable[CaseRange], wanted: Sequence[CaseRange]) -> list[CaseRange]:
    """Return which ranges read ahead can be dropped.

    What was read ahead for the training stays during an evaluation, since the next step wants it.
    """
    is_training = wanted[0].epoch is not None
    same = [each for each in ahead if (each.epoch is not None) == is_training]
    return [each for each in same if each not in wanted]
