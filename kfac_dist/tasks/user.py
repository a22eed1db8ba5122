"""A task that the user wrote, wrapped so that the rest of the program sees a `Task`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from kfac_dist.core.passes.noise import case_key
from kfac_dist.data import (
    BatchedDataset,
    MapDataset,
    Split,
    StreamReader,
    collate,
    gather_at_once,
    limit_cases,
    num_limited,
    seed_generators,
)
from kfac_dist.errors import DataError, InvalidSpecError, UserTaskError
from kfac_dist.tasks.blame import UserFiles, blame_user
from kfac_dist.tasks.task import DISTRIBUTIONS, DistributionName, Task

# The arguments that each method is called with.
_METHODS = {"model": (), "train_data": ("data_dir",), "test_data": ("data_dir",)}
_OPTIONAL_METHODS = {"metrics": ("outputs", "targets")}


@dataclass(frozen=True, kw_only=True)
class UserTask:
    """The user's `instance`; whatever it raises becomes UserTaskError.

    Its data methods get `data_dir`. Floating-point values of its data are cast to `dtype`, and
    `limit` keeps the first cases. `seed` is that of the job.
    """

    files: UserFiles
    instance: Any
    data_dir: Path | None
    limit: int | None
    dtype: torch.dtype
    seed: int

    @property
    def distribution(self) -> DistributionName:
        """The user's distribution; `check_user_task` has checked it."""
        return cast("DistributionName", self.instance.distribution)

    @property
    def class_axis(self) -> int | None:
        """The user's `class_axis`, None if the class has none."""
        return cast("int | None", getattr(self.instance, "class_axis", None))

    def model(self) -> nn.Module:
        """Return a new model of the user; UserTaskError if it is not a torch module."""
        with self._blame("model()"):
            model = self.instance.model()
        if not isinstance(model, nn.Module):
            raise UserTaskError(
                f"task {self.files.label}: model() returned {type(model).__name__}; "
                "it must return a torch.nn.Module"
            )
        return model

    def train_data(self) -> MapDataset:
        """Return the user's training cases."""
        with self._blame("train_data()"):
            dataset = self.instance.train_data(self.data_dir)
        return self._wrap(dataset, "train")

    def test_data(self) -> MapDataset:
        """Return the user's test cases."""
        with self._blame("test_data()"):
            dataset = self.instance.test_data(self.data_dir)
        return self._wrap(dataset, "test")

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Return the user's metrics, an empty dict if the class has no method `metrics`."""
        if not hasattr(self.instance, "metrics"):
            return {}
        with self._blame("metrics()"):
            values: Mapping[str, Tensor] = self.instance.metrics(outputs, targets)
        return values

    def _wrap(self, dataset: Any, split: Split) -> UserDataset:
        name = f"{self.files.label}, {split}_data()"
        # Torch's IterableDataset inherits a __getitem__ that raises.
        is_stream = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
        if not hasattr(dataset, "__len__") or (is_stream and not hasattr(dataset, "__iter__")):
            raise UserTaskError(
                f"task {name}: returned {type(dataset).__name__}; it must return a data set with "
                "__len__, and __getitem__ or __iter__"
            )
        if is_stream and isinstance(dataset, Iterator):
            raise UserTaskError(
                f"task {name}: returned {type(dataset).__name__}, an iterator, which can be read "
                "only once; return an object whose __iter__ begins a new pass at each call"
            )
        with self._blame(f"len of {split}_data()"):
            num_cases = len(dataset)
        if num_cases == 0:
            raise DataError(f"task {name}: returned a data set without cases")
        if is_stream:
            kept = num_limited(split, num_cases, self.limit, f"task {self.files.label}")
            return UserStream(dataset, num_cases, kept, split, self)
        limited = limit_cases(dataset, split, self.limit, f"task {self.files.label}")
        return UserDataset(limited, split, self)

    def _blame(self, doing: str) -> AbstractContextManager[None]:
        return blame_user(self.files, doing, always=True)


class UserDataset(BatchedDataset):
    """The user's data set: whatever it raises becomes UserTaskError, and floats are cast."""

    def __init__(self, dataset: MapDataset, split: Split, task: UserTask) -> None:
        self._dataset = dataset
        self._split = split
        self._task = task

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.gather_cases(torch.tensor([index]))
        return inputs[0], targets[0]

    def gather_cases(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return stacked cases, with floating-point values in the job's dtype."""
        return self.read(indices, None)

    def read(
        self, indices: Tensor, epoch: int | None, seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return stacked cases of a training epoch, or of an evaluation if `epoch` is None.

        With a `seed`, what a case draws from the generators of Python, NumPy and torch depends on
        seed, epoch and case alone.
        """
        files, doing = self._task.files, f"reading the {self._split} data"
        try:
            with blame_user(files, doing, always=True):
                found = gather_at_once(self._dataset, indices)
            if found is None:
                cases = list(self._cases(indices.tolist(), epoch, seed))
                with blame_user(files, doing, always=True):
                    found = collate(cases)
        except DataError as error:
            raise DataError(f"task {files.label}: {doing}: {error.message}") from error
        inputs, targets = found
        return self._cast(inputs), self._cast(targets)

    def _cases(self, indices: list[int], epoch: int | None, seed: int | None) -> Iterator[Any]:
        for index in indices:
            if seed is not None:
                seed_generators(case_key(seed, epoch, index))
            with self._blame(index):
                case = self._dataset[index]
            yield case

    def _blame(self, index: int) -> AbstractContextManager[None]:
        doing = f"reading case {index} of the {self._split} data"
        return blame_user(self._task.files, doing, always=True)

    def _cast(self, values: Tensor) -> Tensor:
        return values.to(self._task.dtype) if values.is_floating_point() else values


class UserStream(UserDataset):
    """An iterable data set of the user: a case is known by its position in a pass.

    Positions are read in ascending order, or a new pass is begun.
    """

    is_stream = True

    def __init__(
        self, dataset: Iterable[Any], num_cases: int, kept: int, split: Split, task: UserTask
    ) -> None:
        """Keep the first `kept` of `num_cases` cases."""
        name = f"{split}_data()"
        self._stream = StreamReader(dataset, num_cases=num_cases, seed=task.seed, name=name)
        super().__init__(range(kept), split, task)

    def _cases(self, indices: list[int], epoch: int | None, seed: int | None) -> Iterator[Any]:
        for start, stop in _runs(indices):
            try:
                yield from self._stream.read(epoch, start, stop)
            except (Exception, SystemExit):
                with self._blame(self._stream.position(epoch)):
                    raise


def _runs(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Return start and stop (exclusive) of each run of consecutive numbers."""
    start = 0
    for place in range(1, len(indices) + 1):
        if place == len(indices) or indices[place] != indices[place - 1] + 1:
            yield indices[start], indices[place - 1] + 1
            start = place


@contextmanager
def user_code(task: Task, doing: str) -> Iterator[None]:
    """Wrap a forward or backward pass of `task`'s model, or its metrics.

    An exception that passed through the user's files becomes UserTaskError. All others pass
    unchanged, as do those of a built-in task.
    """
    if isinstance(task, UserTask):
        with blame_user(task.files, doing, always=False):
            yield
    else:
        yield


def check_user_task(instance: object, files: UserFiles) -> None:
    """Raise InvalidSpecError unless `instance` has the methods and attributes of a task."""
    owner = type(instance).__name__
    for name, arguments in (_METHODS | _OPTIONAL_METHODS).items():
        if hasattr(instance, name):
            _check_method(getattr(instance, name), f"{owner}.{name}", arguments, files)
        elif name in _METHODS:
            raise InvalidSpecError(
                f"task {files.label}: {owner} has no method {name}({', '.join(arguments)})"
            )
    with blame_user(files, "distribution", always=True):
        distribution = getattr(instance, "distribution", None)
    if distribution not in DISTRIBUTIONS:
        found = "is missing" if distribution is None else f"is {distribution!r}"
        raise InvalidSpecError(
            f"task {files.label}: {owner}.distribution {found}; "
            f"it must be one of {', '.join(DISTRIBUTIONS)}"
        )


def _check_method(method: Any, shown: str, arguments: tuple[str, ...], files: UserFiles) -> None:
    if not callable(method):
        raise InvalidSpecError(f"task {files.label}: {shown} is not a method")
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError as error:
        raise InvalidSpecError(
            f"task {files.label}: {shown} must be callable as "
            f"{shown.rpartition('.')[2]}({', '.join(arguments)}): {error}"
        ) from error
    except ValueError:  # a method of a compiled class has no signature to check
        return
