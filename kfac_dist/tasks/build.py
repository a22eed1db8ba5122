"""Build a task's model from a seed, and check that model, data and distribution fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kfac_dist.core.passes.distributions import Distribution, get_distribution
from kfac_dist.core.passes.target_range import TargetRange
from kfac_dist.data import MapDataset, Split, fetch
from kfac_dist.errors import InvalidSpecError, UserTaskError
from kfac_dist.tasks.blame import describe
from kfac_dist.tasks.task import Task
from kfac_dist.tasks.user import UserTask

_NUM_PROBE_CASES = 2


def build_model(task: Task, seed: int, dtype: torch.dtype) -> nn.Module:
    """Return the task's model on the CPU, in `dtype`; a seed always gives the same parameters.

    Torch's global generator keeps its state. Parameters are drawn in float32 for every `dtype`, so
    that runs in both types start from the same point.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return task.model().to(dtype)


def class_axis_of(task: Task) -> int | None:
    """Return the axis of the outputs that has the classes, as `Categorical` takes it.

    It is the last one, unless the class of a user's task has an attribute `class_axis`. Without
    that attribute, shapes that leave a choice are refused.
    """
    return task.class_axis if isinstance(task, UserTask) else -1


def distribution_of(task: Task) -> Distribution:
    """Return the predictive distribution of the task's outputs."""
    return get_distribution(task.distribution, class_axis_of(task))


def check_model(
    task: Task, model: nn.Module, dataset: MapDataset, split: Split = "train"
) -> TargetRange | None:
    """Run `model` on the first two cases of `split`, and check that its outputs fit the targets.

    `Distribution.check_values` says what fits. The model runs in evaluation mode, and is then set
    back to its mode.

    Returns:
        the values that targets may have, None if all numbers are possible.

    Raises:
        UserTaskError: something does not fit; the message says what.
    """
    name = task.files.label if isinstance(task, UserTask) else type(task).__name__
    indices = torch.arange(min(_NUM_PROBE_CASES, len(dataset)))
    inputs, targets = fetch(dataset, indices)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(inputs)
    except Exception as error:
        place = task.files.location(error) if isinstance(task, UserTask) else None
        doing = f"the model, given inputs of shape {tuple(inputs.shape)},"
        raise UserTaskError(
            f"task {name}, {split} data: {describe(doing, error, place)}"
        ) from error
    finally:
        model.train(was_training)
    problem = _misfit(task, outputs, targets)
    if problem is None:
        problem = _bad_metrics(task.metrics(outputs, targets), len(outputs))
    if problem is not None:
        raise UserTaskError(f"task {name}, {split} data: {problem}")
    return distribution_of(task).target_range(outputs)


def _misfit(task: Task, outputs: object, targets: Tensor) -> str | None:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        return f"the model returned {_kind(outputs)}; it must return one tensor of floats"
    try:
        distribution_of(task).check_values(outputs, targets)
    except InvalidSpecError as error:
        return error.message
    return None


def _bad_metrics(metrics: object, num_cases: int) -> str | None:
    if not isinstance(metrics, Mapping):
        return f"metrics() returned {_kind(metrics)}; it must return a dict"
    for name, values in metrics.items():
        shape = tuple(values.shape) if isinstance(values, Tensor) else _kind(values)
        if shape != (num_cases,):
            return (
                f"metrics() returned {shape} for {name!r}; it must return one number a case, "
                f"a tensor of shape ({num_cases},)"
            )
    return None


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
