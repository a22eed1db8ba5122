"""Every number of a data set is checked when it is read; the first ones before anything starts.

A data set that is read case by case may take minutes. So before a job starts only as many cases
are read as fit in a few seconds; the workers check the rest as they read it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.core.passes.target_range import TargetRange
from kfac_dist.data.dataset import BatchedDataset, MapDataset, Split, check_cases, fetch

_SAMPLE = 16  # cases that are read one by one first, from the first case to the last
_MAX_CHUNK = 4096
_CHUNK_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class StartCheck:
    """How much of a split was checked before the start; `seconds` is for `num_checked` cases."""

    split: Split
    num_cases: int
    num_checked: int
    seconds: float

    @property
    def is_whole(self) -> bool:
        """Whether every case was checked."""
        return self.num_checked >= self.num_cases

    @property
    def seconds_for_all(self) -> float:
        """How long one process would need to read the whole split."""
        return self.seconds * self.num_cases / max(1, self.num_checked)


def fetch_checked(
    dataset: MapDataset, indices: Tensor, split: Split, allowed: TargetRange | None = None
) -> tuple[Tensor, Tensor]:
    """Fetch the cases `indices` (int64 `[n]`), and check that their values can be used.

    `allowed` are the targets that the model's outputs allow, None if all numbers are possible.

    Raises:
        DataError: a value is NaN or infinite, or a target is not allowed; the message names split,
            case, position and value.
    """
    inputs, targets = fetch(dataset, indices)
    check_cases(inputs, targets, indices, split, allowed)
    return inputs, targets


def check_before_start(
    dataset: MapDataset, split: Split, seconds: float, allowed: TargetRange | None = None
) -> StartCheck:
    """Check a spread of cases, then all from the first on, until `seconds` are over.

    At least the first and the last case are read, however long that takes; of a stream, the first.

    Raises:
        DataError: as for `fetch_checked`.
    """
    num_cases = len(dataset)
    started = time.monotonic()
    is_stream = isinstance(dataset, BatchedDataset) and dataset.is_stream
    sample = [] if is_stream else _spread(num_cases)
    num_read = 0
    for num_read, index in enumerate(sample, start=1):
        fetch_checked(dataset, torch.tensor([index]), split, allowed)
        if num_read > 1 and time.monotonic() - started > seconds:
            break
    num_checked = 0
    while num_checked < num_cases:
        num_seen, spent = num_read + num_checked, time.monotonic() - started
        if num_seen and spent >= seconds:
            break
        chunk = _chunk(spent / num_seen) if num_seen else 1
        stop = min(num_checked + chunk, num_cases)
        fetch_checked(dataset, torch.arange(num_checked, stop), split, allowed)
        num_checked = stop
    spent = time.monotonic() - started
    whole = num_checked == num_cases
    return StartCheck(
        split=split,
        num_cases=num_cases,
        num_checked=num_cases if whole else min(num_checked + num_read, num_cases - 1),
        seconds=spent,
    )


def _spread(num_cases: int) -> list[int]:
    """Return the last case, the first, and evenly spread ones between them."""
    count = min(_SAMPLE, num_cases)
    positions = {j * (num_cases - 1) // max(1, count - 1) for j in range(count)}
    ends = [num_cases - 1, 0] if num_cases > 1 else [0]
    return [*ends, *sorted(positions - set(ends))]


def _chunk(seconds_a_case: float) -> int:
    return max(1, min(_MAX_CHUNK, int(_CHUNK_SECONDS / max(seconds_a_case, 1e-9))))
