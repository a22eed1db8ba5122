"""Everything about a job that can be found wrong before a process is started for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kfac_dist.config import JobSpec, KFACSpec
from kfac_dist.coordination.steps.sampling import SamplerCursor, next_window
from kfac_dist.core.blocks.registration import Registration, register
from kfac_dist.data import MapDataset, check_finite
from kfac_dist.errors import InvalidSpecError
from kfac_dist.tasks import build_model, check_model, load_task, torch_dtype
from workers.planning import batch_size


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A task that has been tried out in this process; `registration` is None for a baseline.

    `has_buffers` tells whether the model has state beside its parameters.
    """

    train: MapDataset
    test: MapDataset
    registration: Registration | None
    has_buffers: bool

    @property
    def num_train_cases(self) -> int:
        """The number of training cases."""
        return len(self.train)

    def check_data(self) -> None:
        """Look at every number of both data sets.

        Raises:
            DataError: one is not finite; the message says where.
        """
        check_finite(self.train, "train")
        check_finite(self.test, "test")


def prepare(
    spec: JobSpec, *, base_dir: Path, data_dir: Path | None, cache_dir: Path
) -> Preparation:
    """Load task and data, build the model once, and see whether they fit together.

    Raises:
        InvalidSpecError: the specification does not fit the task, its data or its model.
        DataNotFoundError: the data are in none of the places.
        UserTaskError: the user's task raised.
    """
    task = load_task(spec, base_dir, data_dir=data_dir, cache_dir=cache_dir)
    model = build_model(task, spec.seed, torch_dtype(spec.dtype))
    settings = spec.optimizer
    registration = register(model, settings) if isinstance(settings, KFACSpec) else None
    train, test = task.train_data(), task.test_data()
    check_model(task, model, train)
    _check_batch_size(spec, len(train))
    has_buffers = next(model.buffers(), None) is not None
    return Preparation(train=train, test=test, registration=registration, has_buffers=has_buffers)


def _check_batch_size(spec: JobSpec, num_cases: int) -> None:
    size = batch_size(spec, 1, num_cases)
    next_window(SamplerCursor(epoch=0, offset=0), size, num_cases)
    if size < spec.workers.gradient:
        raise InvalidSpecError(
            f"workers.gradient: {spec.workers.gradient} gradient workers cannot share a batch of "
            f"{size} cases"
        )
