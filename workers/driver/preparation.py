"""Checks all that can be checked about a job before a process is started for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kfac_dist.config import JobSpec, KFACSpec
from kfac_dist.coordination.steps.sampling import SamplerCursor, next_window
from kfac_dist.core.blocks.registration import Registration, register
from kfac_dist.core.passes.target_range import TargetRange
from kfac_dist.data import MapDataset, check_finite
from kfac_dist.errors import InvalidSpecError
from kfac_dist.tasks import build_model, check_model, load_task, torch_dtype
from workers.planning import batch_size


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A task that was loaded and checked in this process.

    `registration` is None for a baseline, which has no curvature blocks. `has_buffers`: the model
    has state beside its parameters. `allowed_targets` are those that the model's outputs allow,
    None if all numbers are possible.
    """

    train: MapDataset
    test: MapDataset
    registration: Registration | None
    has_buffers: bool
    allowed_targets: TargetRange | None

    @property
    def num_train_cases(self) -> int:
        """The number of training cases."""
        return len(self.train)

    def check_data(self) -> None:
        """Check that every number of both data sets is finite, and every target possible.

        Raises:
            DataError: a number is not; the message says where.
        """
        check_finite(self.train, "train", self.allowed_targets)
        check_finite(self.test, "test", self.allowed_targets)


def prepare(
    spec: JobSpec, *, base_dir: Path, data_dir: Path | None, cache_dir: Path
) -> Preparation:
    """Load task and data, build the model once, and check that they fit together.

    Raises:
        InvalidSpecError: the specification does not fit the task, its data or its model.
        DataNotFoundError: the data are in neither folder.
        UserTaskError: the user's task raised an error.
    """
    task = load_task(spec, base_dir, data_dir=data_dir, cache_dir=cache_dir)
    model = build_model(task, spec.seed, torch_dtype(spec.dtype))
    settings = spec.optimizer
    registration = register(model, settings) if isinstance(settings, KFACSpec) else None
    train, test = task.train_data(), task.test_data()
    allowed = check_model(task, model, train, "train")
    check_model(task, model, test, "test")
    _check_batch_size(spec, len(train))
    has_buffers = next(model.buffers(), None) is not None
    return Preparation(
        train=train,
        test=test,
        registration=registration,
        has_buffers=has_buffers,
        allowed_targets=allowed,
    )


def _check_batch_size(spec: JobSpec, num_cases: int) -> None:
    size = batch_size(spec, 1, num_cases)
    next_window(SamplerCursor(epoch=0, offset=0), size, num_cases)  # raises if it is too large
    if size < spec.workers.gradient:
        raise InvalidSpecError(
            f"workers.gradient: {spec.workers.gradient} gradient workers cannot share a batch of "
            f"{size} cases"
        )
