"""Data sets of arrays, and the two things that a worker does with any data set: fetch and check.

The arrays may be mapped from files: only the rows that are fetched are read, and a data set that
casts or scales values does so for those rows.

A data set is map-style: it has `len(dataset)` cases, and `dataset[i]` is the pair `(input, target)`
of case i.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from kfac_dist.core.passes.target_range import TargetRange
from kfac_dist.errors import DataError, InvalidSpecError

Split = Literal["train", "test"]

_WHITE = 255  # the largest value in an 8-bit image
_CHECK_CHUNK = 4096  # cases that `check_finite` fetches at once: more memory, fewer calls


class MapDataset(Protocol):
    """What a task returns: a map-style data set of `(input, target)` pairs."""

    def __len__(self) -> int:
        """Return the number of cases."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Return the pair `(input, target)` of one case."""
        ...


class BatchedDataset(Dataset[tuple[Tensor, Tensor]], ABC):
    """A data set that gathers many cases at once.

    This is a base class rather than a protocol, so that a data set of another library never counts
    as one by the names of its methods.
    """

    reads_in_threads: ClassVar[bool] = False
    """Whether one thread may gather cases while another uses this process for something else."""
    is_stream: ClassVar[bool] = False
    """Whether cases can only be read one after the other, so that their order is not shuffled."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of cases."""

    @abstractmethod
    def gather_cases(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the cases `indices` (int64 `[n]`), stacked in that order."""


class ArrayDataset(BatchedDataset):
    """Cases in two tensors `[N, ...]`, which are kept, not copied.

    Args:
        inputs: a row for each case.
        targets: the same.
        input_dtype: of the inputs that are fetched; None for that of `inputs`.
        target_dtype: the same for the targets.
    """

    reads_in_threads = True

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        input_dtype: torch.dtype | None = None,
        target_dtype: torch.dtype | None = None,
    ) -> None:
        if len(inputs) != len(targets):
            raise DataError(f"{len(inputs)} inputs but {len(targets)} targets; one each is needed")
        self.inputs = inputs
        self.targets = targets
        self.input_dtype = input_dtype or inputs.dtype
        self.target_dtype = target_dtype or targets.dtype

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.inputs[index], self.targets[index]
        return inputs.to(self.input_dtype), targets.to(self.target_dtype)

    def first(self, count: int) -> ArrayDataset:
        """Return the first `count` cases."""
        return ArrayDataset(
            self.inputs[:count],
            self.targets[:count],
            input_dtype=self.input_dtype,
            target_dtype=self.target_dtype,
        )

    def gather_cases(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the chosen rows, in the order of `indices`."""
        inputs = self.inputs.index_select(0, indices).to(self.input_dtype)
        return inputs, self.targets.index_select(0, indices).to(self.target_dtype)


@dataclass(frozen=True, kw_only=True)
class ChannelScale:
    """Mean and standard deviation of the pixels of each channel, scaled to [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class ImageDataset(BatchedDataset):
    """Images kept as 8-bit values and scaled to [0, 1] in `dtype` when they are fetched.

    They stay 8-bit because 376 MB of MNIST in float64 are 47 MB then, and scaling a batch takes
    less than a millisecond.

    Args:
        pixels: uint8 `[N, ...]`; with `scale`, `[N, channels, height, width]`.
        labels: integers `[N]`, fetched as int64, or None if the image is its own target; then
            `gather_cases` returns the same tensor twice.
        dtype: of the images that are fetched.
        scale: standardises each channel, after the scaling to [0, 1].
    """

    reads_in_threads = True

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor | None,
        dtype: torch.dtype,
        scale: ChannelScale | None = None,
    ) -> None:
        if labels is not None and len(pixels) != len(labels):
            raise DataError(f"{len(pixels)} images but {len(labels)} labels; one each is needed")
        self.pixels = pixels
        self.labels = labels
        self.dtype = dtype
        self.scale = scale

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs = self._scaled(self.pixels[index])
        return inputs, inputs if self.labels is None else self.labels[index].to(torch.int64)

    def gather_cases(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return scaled images `[n, ...]` and their targets, in the order of `indices`."""
        inputs = self._scaled(self.pixels.index_select(0, indices))
        if self.labels is None:
            return inputs, inputs
        return inputs, self.labels.index_select(0, indices).to(torch.int64)

    def _scaled(self, pixels: Tensor) -> Tensor:
        values = pixels.to(self.dtype).div_(_WHITE)
        if self.scale is None:
            return values
        mean, std = (
            torch.tensor(numbers, dtype=self.dtype).view(-1, 1, 1)
            for numbers in (self.scale.mean, self.scale.std)
        )
        return values.sub_(mean).div_(std)


def fetch(dataset: MapDataset, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of the cases `indices` (int64 `[n]`), stacked in that order.

    Data sets of tensors are gathered at once, all others case by case. Raises DataError if the
    cases are not pairs, or cannot be stacked.
    """
    found = gather_at_once(dataset, indices)
    if found is not None:
        return found
    return collate([dataset[index] for index in indices.tolist()])


def gather_at_once(dataset: MapDataset, indices: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return inputs and targets of cases that can be read at once; None if they cannot."""
    if isinstance(dataset, BatchedDataset):
        return dataset.gather_cases(indices)
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
        inputs, targets = dataset.tensors
        return inputs.index_select(0, indices), targets.index_select(0, indices)
    return None


def collate(cases: list[Any]) -> tuple[Tensor, Tensor]:
    """Stack pairs (input, target); DataError if they are not pairs, or cannot be stacked."""
    for case in cases:
        if not isinstance(case, tuple | list) or len(case) != 2:
            raise DataError(f"a case must be a pair (input, target), not {_describe(case)}")
    try:
        inputs, targets = default_collate([tuple(case) for case in cases])
    except (TypeError, RuntimeError) as error:
        raise DataError(f"the cases of a batch cannot be stacked: {error}") from error
    for part, value in (("input", inputs), ("target", targets)):
        if not isinstance(value, Tensor):
            raise DataError(
                f"the {part} of a case must be a tensor, an array or a number, "
                f"not {_describe(cases[0][0 if part == 'input' else 1])}"
            )
    return inputs, targets


def _describe(value: object) -> str:
    kind = type(value).__name__
    return f"{kind} of length {len(value)}" if isinstance(value, tuple | list) else kind


def check_finite(dataset: MapDataset, split: Split, allowed: TargetRange | None = None) -> None:
    """Raise DataError at the first NaN or infinity in `dataset`, or target that is not `allowed`.

    The message names the split, the case, the position in the case and the value.
    """
    num_cases = len(dataset)
    for start in range(0, num_cases, _CHECK_CHUNK):
        indices = torch.arange(start, min(start + _CHECK_CHUNK, num_cases))
        check_cases(*fetch(dataset, indices), indices, split, allowed)


def check_cases(
    inputs: Tensor,
    targets: Tensor,
    indices: Tensor,
    split: Split,
    allowed: TargetRange | None = None,
) -> None:
    """Raise DataError at the first bad value among the cases `indices` (int64 `[n]`).

    `inputs` and `targets` are `[n, ...]`. What is bad, and the message, are as in `check_finite`.
    """
    _check_part(inputs, indices, f"{split} data, input")
    if targets is not inputs:
        _check_part(targets, indices, f"{split} data, target")
    if allowed is not None:
        _check_range(targets, indices, f"{split} data, target", allowed)


def _check_part(values: Tensor, indices: Tensor, what: str) -> None:
    if not values.is_floating_point() and not values.is_complex():
        return
    # Reads the values once and writes nothing. A sum of finite numbers may overflow.
    if torch.isfinite(values.sum()):
        return
    bad = ~torch.isfinite(values)
    if not bad.any():
        return
    place = tuple(bad.nonzero()[0].tolist())
    raise DataError(f"{_found(values, place, indices, what)}: every value must be a finite number")


def _check_range(targets: Tensor, indices: Tensor, what: str, allowed: TargetRange) -> None:
    place = allowed.first_outside(targets)
    if place is not None:
        raise DataError(f"{_found(targets, place, indices, what)}: it must be {allowed}")


def _found(values: Tensor, place: tuple[int, ...], indices: Tensor, what: str) -> str:
    row, *inside = place
    where = f" at position {inside[0] if len(inside) == 1 else tuple(inside)}" if inside else ""
    return f"{what} of case {int(indices[row])}{where} is {values[place].item()}"


def num_limited(split: Split, num_cases: int, limit: int | None, name: str) -> int:
    """Return how many of `num_cases` cases `limit` leaves in `split`.

    A test set that is smaller than the limit is used whole. Raises InvalidSpecError if the limit
    is below 1 or above the number of training cases.
    """
    if limit is None:
        return num_cases
    if limit < 1:
        raise InvalidSpecError(f"data.limit: {limit} is below 1 ({name} has {num_cases} cases)")
    if split == "train" and limit > num_cases:
        raise InvalidSpecError(
            f"data.limit: {limit} is more than the {num_cases} training cases of {name}"
        )
    return min(limit, num_cases)


def limit_cases(dataset: MapDataset, split: Split, limit: int | None, name: str) -> MapDataset:
    """Return the first `limit` cases of `dataset` (see `num_limited`)."""
    kept = num_limited(split, len(dataset), limit, name)
    if kept == len(dataset):
        return dataset
    if isinstance(dataset, ArrayDataset):
        return dataset.first(kept)
    if type(dataset) is TensorDataset:
        return TensorDataset(*(tensor[:kept] for tensor in dataset.tensors))
    return Subset(dataset, range(kept))  # type: ignore[arg-type]  # any map-style set will do
