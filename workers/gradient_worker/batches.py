"""A gradient worker's part of a batch.

Which cases are in a batch, and which of them are used for statistics and Fisher products, does not
depend on the number of workers. Each worker takes a contiguous slice of the batch, and with it the
cases of both subsets that lie in its slice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.coordination.steps.sampling import (
    BatchWindow,
    SamplerCursor,
    SubsetRule,
    next_window,
    worker_part,
)
from kfac_dist.core.vector import rows_at
from workers.gradient_worker.reading import CaseRange, CaseReader


@dataclass(frozen=True, kw_only=True)
class Subset:
    """The cases of a worker's part that belong to a subset of the batch.

    `positions` count within the part. `first_row` is the place of the first of them among the
    cases of the whole subset.
    """

    positions: tuple[int, ...]
    first_row: int

    def select(self, values: Tensor) -> Tensor:
        """Return these cases of `values` [n, ...]; the tensor itself if they are all of it."""
        return rows_at(values, self.positions)


@dataclass(frozen=True, kw_only=True)
class BatchPart:
    """Inputs and targets of the cases at `slice` of a batch of `batch_size`."""

    inputs: Tensor
    targets: Tensor
    slice: range
    batch_size: int
    subset_rule: SubsetRule

    def subset(self, fraction: float) -> Subset:
        """Return the cases of this part that are in the evenly strided subset of the batch."""
        positions = self.subset_positions(fraction)
        first = bisect_left(positions, self.slice.start)
        stop = bisect_left(positions, self.slice.stop)
        own = tuple(position - self.slice.start for position in positions[first:stop])
        return Subset(positions=own, first_row=first)

    def subset_positions(self, fraction: float) -> list[int]:
        """Return the positions of the subset in the whole batch."""
        return self.subset_rule.positions(self.batch_size, fraction)


class BatchReader:
    """Reads a worker's parts of the batches; `place` says which they are.

    `least_cases` is the number of cases that a pass over the model needs. Up to `prefetch_batches`
    batches are read ahead: those that are expected, or without any those that follow if the size
    of the batches stays what it is.
    """

    def __init__(
        self,
        cases: CaseReader,
        *,
        device: torch.device,
        least_cases: int = 1,
        prefetch_batches: int = 0,
    ) -> None:
        self._cases = cases
        self._prefetch_batches = prefetch_batches
        self._expected: list[BatchWindow] = []
        self._last_size: int | None = None
        self._device = device
        self._least_cases = least_cases
        self._rank: int  # set by `place`
        self._num_workers: int  # set by `place`

    def place(self, rank: int, num_workers: int) -> None:
        """Read the parts of worker `rank` of `num_workers` from now on."""
        self._rank, self._num_workers = rank, num_workers

    def expect(self, windows: Sequence[BatchWindow]) -> None:
        """Let these batches be read ahead, in this order, instead of those expected before."""
        self._expected = list(windows)

    def read(self, window: BatchWindow) -> BatchPart:
        """Return this worker's part of the batch; DataError if a value in it cannot be used."""
        part = worker_part(window.size, self._num_workers, self._rank)
        coming = [self._own_cases(each) for each in self._coming(window)]
        inputs, targets = self._cases.read(self._own_cases(window), coming)
        return BatchPart(
            inputs=inputs.to(self._device),
            targets=targets.to(self._device),
            slice=part,
            batch_size=window.size,
            subset_rule=SubsetRule(least_cases=self._least_cases, num_workers=self._num_workers),
        )

    def _own_cases(self, window: BatchWindow) -> CaseRange:
        part = worker_part(window.size, self._num_workers, self._rank)
        return CaseRange(
            split="train",
            epoch=window.epoch,
            start=window.start + part.start,
            stop=window.start + part.stop,
        )

    def _coming(self, window: BatchWindow) -> Sequence[BatchWindow]:
        """Return the batches to read ahead while the step with `window` is done."""
        if window in self._expected:
            self._expected = self._expected[self._expected.index(window) + 1 :]
        known = self._expected[: self._prefetch_batches]
        is_steady = self._last_size in (None, window.size)
        self._last_size = window.size
        return known if known or not is_steady else self._following(window)

    def _following(self, window: BatchWindow) -> list[BatchWindow]:
        cursor = SamplerCursor(epoch=window.epoch, offset=window.stop)
        windows = []
        for _ in range(self._prefetch_batches):
            following, cursor = next_window(cursor, window.size, self._cases.num_cases("train"))
            windows.append(following)
        return windows
