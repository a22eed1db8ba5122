"""A gradient worker's part of a batch.

Which cases are in a batch, and which of them are used for statistics and Fisher products, does not
depend on the number of workers. Each worker takes a contiguous slice of the batch, and with it the
cases of both subsets that lie in its slice.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.coordination.steps.sampling import BatchWindow, SubsetRule, worker_part
from kfac_dist.core.passes.noise import permutation
from kfac_dist.core.passes.target_range import TargetRange
from kfac_dist.core.vector import rows_at
from kfac_dist.data import MapDataset, fetch_checked


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

    `least_cases` is the number of cases that a pass over the model needs. `allowed_targets` are
    those that the model's outputs allow, None if all numbers are possible.
    """

    def __init__(
        self,
        dataset: MapDataset,
        *,
        seed: int,
        device: torch.device,
        least_cases: int = 1,
        allowed_targets: TargetRange | None = None,
    ) -> None:
        self._allowed_targets = allowed_targets
        self._dataset = dataset
        self._seed = seed
        self._device = device
        self._least_cases = least_cases
        self._order: tuple[int, Tensor] | None = None
        self._rank: int  # set by `place`
        self._num_workers: int  # set by `place`

    def place(self, rank: int, num_workers: int) -> None:
        """Read the parts of worker `rank` of `num_workers` from now on."""
        self._rank, self._num_workers = rank, num_workers

    def read(self, window: BatchWindow) -> BatchPart:
        """Return this worker's part of the batch; DataError if a value in it cannot be used."""
        part = worker_part(window.size, self._num_workers, self._rank)
        order = self._epoch_order(window.epoch)
        indices = order[window.start + part.start : window.start + part.stop]
        inputs, targets = fetch_checked(self._dataset, indices, "train", self._allowed_targets)
        return BatchPart(
            inputs=inputs.to(self._device),
            targets=targets.to(self._device),
            slice=part,
            batch_size=window.size,
            subset_rule=SubsetRule(least_cases=self._least_cases, num_workers=self._num_workers),
        )

    def _epoch_order(self, epoch: int) -> Tensor:
        """Return the shuffled order of an epoch, which is kept until the next epoch."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self._seed, epoch, len(self._dataset)))
        return self._order[1]
