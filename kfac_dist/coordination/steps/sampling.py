"""Which cases make up a batch, and which gradient worker computes on which of them?

Nothing here depends on the number of workers except `worker_part`, and parts are contiguous slices
of the batch: W workers see the same batch as one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from kfac_dist.coordination.checks import check_interval
from kfac_dist.errors import InvalidSpecError


@dataclass(frozen=True, kw_only=True)
class SamplerCursor:
    """The position in the data: `offset` cases of the shuffled order of `epoch` are used up.

    Both count from 0. This is the only state of the sampler, and it is saved in checkpoints.
    """

    epoch: int
    offset: int

    def __post_init__(self) -> None:
        check_interval("epoch", self.epoch, 0)
        check_interval("offset", self.offset, 0)


@dataclass(frozen=True, kw_only=True)
class BatchWindow:
    """Positions `start` to `stop` (exclusive) of the shuffled order of `epoch`: one batch."""

    epoch: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        check_interval("epoch", self.epoch, 0)
        check_interval("start", self.start, 0)
        check_interval("stop", self.stop, self.start + 1)

    @property
    def size(self) -> int:
        """The number of cases in the batch."""
        return self.stop - self.start


def next_window(
    cursor: SamplerCursor, batch_size: int, num_cases: int
) -> tuple[BatchWindow, SamplerCursor]:
    """Return the next batch of exactly `batch_size` cases, and the cursor after it.

    A batch lies in one epoch, so no case occurs twice in it. If the rest of the epoch is too short
    for a batch, it is skipped and the next epoch begins.

    Raises:
        InvalidSpecError: `batch_size` is not between 1 and `num_cases`.
    """
    if not 1 <= batch_size <= num_cases:
        raise InvalidSpecError(
            f"batch_size must be between 1 and the number of training cases, {num_cases}; "
            f"got {batch_size}"
        )
    epoch, start = cursor.epoch, cursor.offset
    if start + batch_size > num_cases:
        epoch, start = epoch + 1, 0
    stop = start + batch_size
    return BatchWindow(epoch=epoch, start=start, stop=stop), SamplerCursor(epoch=epoch, offset=stop)


def worker_part(size: int, num_workers: int, rank: int) -> range:
    """Return the positions, among `size` cases, that belong to gradient worker `rank`.

    The parts are contiguous, in rank order and cover all cases; their sizes differ by at most 1,
    earlier ranks have more. With fewer cases than workers the last parts are empty.
    """
    check_interval("size", size, 0)
    check_interval("num_workers", num_workers, 1)
    check_interval("rank", rank, 0, num_workers - 1)
    small, num_larger = divmod(size, num_workers)
    start = rank * small + min(rank, num_larger)
    return range(start, start + small + (rank < num_larger))


def subset_positions(size: int, fraction: float) -> list[int]:
    """Return `ceil(fraction * size)` positions of a batch, ascending and evenly strided.

    Position j is `floor(j * size / count)`. Even strides, so that every worker has its part of the
    work. `fraction` is in (0, 1] and taken as the decimal number it is written as: 0.07 of 100 are
    7, although the float is a little more than 0.07.
    """
    check_interval("size", size, 0)
    if not 0 < fraction <= 1:
        raise InvalidSpecError(f"fraction must be above 0 and at most 1; got {fraction}")
    exact = Fraction(repr(float(fraction)))
    count = -(-exact.numerator * size // exact.denominator)
    return _strided(size, count)


def _strided(size: int, count: int) -> list[int]:
    return [j * size // count for j in range(count)]


@dataclass(frozen=True, kw_only=True)
class SubsetRule:
    """Chooses the cases of a batch for statistics and for Fisher products.

    A model with batch normalisation cannot run on one case. So every one of `num_workers` workers
    gets at least `least_cases` cases of the subset, as far as its part has them, or none.
    """

    least_cases: int = 1
    num_workers: int = 1

    def positions(self, size: int, fraction: float) -> list[int]:
        """Return what `subset_positions` does, or the smallest larger subset that is enough."""
        positions = subset_positions(size, fraction)
        while not self._is_enough(positions, size):
            positions = _strided(size, len(positions) + 1)
        return positions

    def _is_enough(self, positions: Sequence[int], size: int) -> bool:
        if self.least_cases == 1 or len(positions) == size:
            return True
        parts = [worker_part(size, self.num_workers, rank) for rank in range(self.num_workers)]
        own = [
            bisect_left(positions, part.stop) - bisect_left(positions, part.start) for part in parts
        ]
        return not any(
            0 < number < min(self.least_cases, len(part))
            for number, part in zip(own, parts, strict=True)
        )
