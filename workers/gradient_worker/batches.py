"""A gradient worker's part of a batch.

Which cases are in a batch, and which of them serve for statistics and Fisher products, does not
depend on the number of workers: each takes its contiguous slice of all three.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.coordination.steps.sampling import BatchWindow, shard, subset_positions
from kfac_dist.core.passes.noise import permutation
from kfac_dist.core.vector import rows_at
from kfac_dist.data import MapDataset, fetch


@dataclass(frozen=True, kw_only=True)
class Subset:
    """The cases of this part that belong to a subset of the batch.

    `positions` counts within this part; `first_row` is the place of the first one among the
    `num_total` cases of the subset in the whole batch.
    """

    positions: tuple[int, ...]
    first_row: int
    num_total: int

    def take(self, values: Tensor) -> Tensor:
        """Return these cases of `values` [n, ...]; the tensor itself when they are all."""
        return rows_at(values, self.positions)


@dataclass(frozen=True, kw_only=True)
class BatchPart:
    """Inputs and targets of the cases at `slice` of a batch of `batch_size`."""

    inputs: Tensor
    targets: Tensor
    slice: range
    batch_size: int

    def subset(self, fraction: float) -> Subset:
        """Return this part of the evenly strided subset of the batch."""
        positions = subset_positions(self.batch_size, fraction)
        first = bisect_left(positions, self.slice.start)
        stop = bisect_left(positions, self.slice.stop)
        own = tuple(position - self.slice.start for position in positions[first:stop])
        return Subset(positions=own, first_row=first, num_total=len(positions))


class BatchReader:
    """Reads the parts of the batches that belong to `rank` of `num_shards`."""

    def __init__(
        self, dataset: MapDataset, *, seed: int, num_shards: int, rank: int, device: torch.device
    ) -> None:
        self._dataset = dataset
        self._seed = seed
        self._num_shards = num_shards
        self._rank = rank
        self._device = device
        self._order: tuple[int, Tensor] | None = None

    def read(self, window: BatchWindow) -> BatchPart:
        """Return this worker's part of the batch."""
        part = shard(window.size, self._num_shards, self._rank)
        order = self._epoch_order(window.epoch)
        indices = order[window.start + part.start : window.start + part.stop]
        inputs, targets = fetch(self._dataset, indices)
        return BatchPart(
            inputs=inputs.to(self._device),
            targets=targets.to(self._device),
            slice=part,
            batch_size=window.size,
        )

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self._seed, epoch, len(self._dataset)))
        return self._order[1]
