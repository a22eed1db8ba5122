"""Build a task's model from a seed, and check that model, data and distribution fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kfac_dist.data import MapDataset, fetch
from kfac_dist.errors import UserTaskError
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


def check_model(task: Task, model: nn.Module, dataset: MapDataset) -> None:
    """Run `model` on the first two cases and check that its outputs fit the distribution.

    Outputs and targets must have the same shape. For `categorical`, outputs have one more
    dimension, and targets are integers below its size. The model runs in evaluation mode, and is
    then set back to its mode. Raises UserTaskError that says what does not fit.
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
        raise UserTaskError(f"task {name}: {describe(doing, error, place)}") from error
    finally:
        model.train(was_training)
    problem = _misfit(task.distribution, outputs, targets)
    if problem is None:
        problem = _bad_metrics(task.metrics(outputs, targets), len(outputs))
    if problem is not None:
        raise UserTaskError(f"task {name}: {problem}")


def _misfit(distribution: str, outputs: object, targets: Tensor) -> str | None:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        return f"the model returned {_kind(outputs)}; it must return one tensor of floats"
    shapes = f"outputs have shape {tuple(outputs.shape)}, targets {tuple(targets.shape)}"
    if distribution != "categorical":
        if outputs.shape != targets.shape:
            return f"{shapes}: for {distribution} they must be the same"
        if distribution == "bernoulli" and not ((targets >= 0) & (targets <= 1)).all():
            return "targets of a bernoulli distribution must lie in [0, 1]"
        return None
    if outputs.dim() < 2 or outputs.shape[:-1] != targets.shape:
        return f"{shapes}: for categorical, outputs must have one more dimension, the classes"
    if targets.is_floating_point() or targets.dtype == torch.bool:
        return f"targets of a categorical distribution must be integers, not {targets.dtype}"
    num_classes = outputs.shape[-1]
    if targets.min() < 0 or targets.max() >= num_classes:
        return f"a target lies outside 0..{num_classes - 1}, the classes of the model's outputs"
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
