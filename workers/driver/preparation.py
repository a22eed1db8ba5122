"""Checks all that can be checked about a job before a process is started for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kfac_dist.config import JobSpec, KFACSpec
from kfac_dist.coordination.steps.sampling import SamplerCursor, next_window
from kfac_dist.core.blocks.registration import Registration, register
from kfac_dist.core.passes.target_range import TargetRange
from kfac_dist.core.vector import trainable_parameters
from kfac_dist.data import BatchedDataset, MapDataset, Split, StartCheck, check_before_start
from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim.factor_memory import check_factor_memory
from kfac_dist.tasks import build_model, check_model, load_task, torch_dtype, working_folder
from workers.planning import batch_size

_CHECK_SECONDS = 3.0  # for each of the two data sets


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A task that was loaded and checked in this process.

    The user's code runs in `base_dir`. `registration` is None for a baseline, which has no
    curvature blocks. `num_parameters` counts the trainable ones. `has_buffers`: the model has state
    beside its parameters. `allowed_targets` are those that the model's outputs allow, None if all
    numbers are possible.
    """

    base_dir: Path
    train: MapDataset
    test: MapDataset
    registration: Registration | None
    num_parameters: int
    has_buffers: bool
    allowed_targets: TargetRange | None

    @property
    def num_train_cases(self) -> int:
        """The number of training cases."""
        return len(self.train)

    def check_data(self) -> tuple[str, ...]:
        """Check that the values of both data sets can be used, as many as can be read in seconds.

        Numbers must be finite, and targets possible. Returns what was left for the workers to
        check, in a sentence for each split.

        Raises:
            DataError: a number is not; the message says where.
        """
        allowed = self.allowed_targets
        with working_folder(self.base_dir):
            checks = (
                check_before_start(self.train, "train", _CHECK_SECONDS, allowed),
                check_before_start(self.test, "test", _CHECK_SECONDS, allowed),
            )
        return tuple(_rest(check) for check in checks if not check.is_whole)


def prepare(
    spec: JobSpec, *, base_dir: Path, data_dir: Path | None, cache_dir: Path
) -> Preparation:
    """Load task and data, build the model once, and check that they fit together.

    Raises:
        InvalidSpecError: the specification does not fit the task, its data or its model.
        DataNotFoundError: the data are in neither folder.
        UserTaskError: the user's task raised an error.
    """
    with working_folder(base_dir):
        task = load_task(spec, base_dir, data_dir=data_dir, cache_dir=cache_dir)
        model = build_model(task, spec.seed, torch_dtype(spec.dtype))
        settings = spec.optimizer
        registration = register(model, settings) if isinstance(settings, KFACSpec) else None
        if registration is not None:
            like = next(p for p in model.parameters() if p.requires_grad)
            check_factor_memory(registration, like)
        train, test = task.train_data(), task.test_data()
        allowed = check_model(task, model, train, "train")
        check_model(task, model, test, "test")
    _check_batch_size(spec, len(train))
    _check_data_processes(spec, {"train": train, "test": test})
    return Preparation(
        base_dir=base_dir,
        train=train,
        test=test,
        registration=registration,
        num_parameters=sum(p.numel() for p in trainable_parameters(model).values()),
        has_buffers=next(model.buffers(), None) is not None,
        allowed_targets=allowed,
    )


def _rest(check: StartCheck) -> str:
    return (
        f"reading the {check.split} data set: {check.num_checked:,} of {check.num_cases:,} cases "
        f"were read and checked in {check.seconds:.1f} s; the rest is checked when it is read. "
        f"All of it takes about {check.seconds_for_all:.0f} s in one process, in each epoch and "
        "each evaluation; evaluation.limit makes evaluations shorter"
    )


def _check_data_processes(spec: JobSpec, data: Mapping[Split, MapDataset]) -> None:
    num_workers = spec.data.num_workers
    for split, dataset in data.items():
        if num_workers > 1 and isinstance(dataset, BatchedDataset) and dataset.is_stream:
            raise InvalidSpecError(
                f"data.num_workers: {num_workers} processes would each read all of the iterable "
                f"{split} data, only to drop the cases of the others; use 1 or 0"
            )


def _check_batch_size(spec: JobSpec, num_cases: int) -> None:
    size = batch_size(spec, 1, num_cases)
    next_window(SamplerCursor(epoch=0, offset=0), size, num_cases)  # raises if it is too large
    if size < spec.workers.gradient:
        raise InvalidSpecError(
            f"workers.gradient: {spec.workers.gradient} gradient workers cannot share a batch of "
            f"{size} cases"
        )
