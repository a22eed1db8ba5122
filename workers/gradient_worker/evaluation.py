"""Loss and metrics over a whole data set, as sums, so that the workers' parts can be added."""

from __future__ import annotations

import torch

from kfac_dist.coordination.steps.sampling import worker_part
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.passes.own_passes import own_passes
from kfac_dist.core.vector import flatten
from kfac_dist.data import MapDataset, fetch
from kfac_dist.tasks import Task
from workers.exchange.messages import EvaluationSums

_CHUNK = 1000  # cases evaluated together; more need more memory, fewer more calls


def evaluate(
    computer: BatchComputer, task: Task, dataset: MapDataset, *, num_workers: int, rank: int
) -> EvaluationSums:
    """Return the sums over the part of `dataset` that belongs to worker `rank`.

    The model is evaluated in evaluation mode, and left in the mode it was in.
    """
    parameters = flatten(computer.parameters)
    part = worker_part(len(dataset), num_workers, rank)
    loss = 0.0
    metrics: dict[str, float] = {}
    was_training = computer.model.training
    computer.model.eval()
    try:
        with own_passes(computer.model):
            for start in range(part.start, part.stop, _CHUNK):
                indices = torch.arange(start, min(start + _CHUNK, part.stop))
                chunk_loss, chunk_metrics = _chunk(computer, task, dataset, indices)
                loss += chunk_loss
                for name, value in chunk_metrics.items():
                    metrics[name] = metrics.get(name, 0.0) + value
    finally:
        computer.model.train(was_training)
    return EvaluationSums(
        num_cases=len(part),
        loss=loss,
        metrics=metrics,
        half_square_norm=0.5 * float(torch.dot(parameters, parameters)),
    )


def _chunk(
    computer: BatchComputer, task: Task, dataset: MapDataset, indices: torch.Tensor
) -> tuple[float, dict[str, float]]:
    device = computer.parameters[0].device
    inputs, targets = (values.to(device) for values in fetch(dataset, indices))
    with torch.no_grad():
        outputs = computer.model(inputs)
        loss = computer.distribution.loss(outputs, targets).double().sum()
        metrics = {
            name: float(values.double().sum())
            for name, values in task.metrics(outputs, targets).items()
        }
    return float(loss), metrics
