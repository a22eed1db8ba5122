"""Loss and metrics over a whole data set, as sums, so that the workers' parts can be added."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from kfac_dist.coordination.steps.sampling import worker_part
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.passes.own_passes import own_passes
from kfac_dist.core.vector import flatten
from kfac_dist.data import MapDataset, Split, fetch
from kfac_dist.tasks import Task
from workers.exchange.messages import EvaluationSums
from workers.gradient_worker.reading import CaseRange, CaseReader
from workers.heartbeat import beat

_MOST_CASES = 1000  # evaluated together: more would hardly be faster
_MOST_BYTES = 16 * 2**20  # of inputs evaluated together, if there are more of them than in a step
_CALL_SECONDS = 10.0  # how often the driver hears how far an evaluation is


def evaluate(
    computer: BatchComputer,
    task: Task,
    reader: CaseReader,
    split: Split,
    *,
    limit: int | None,
    num_workers: int,
    rank: int,
    chunk: int = _MOST_CASES,
    before: EvaluationSums | None = None,
) -> EvaluationSums:
    """Return the sums over the part of a split that belongs to worker `rank`.

    The call returns after some seconds with the sums so far, so that the driver can say how far
    the evaluation is; with these as `before`, the next call continues. The sums do not depend on
    where it stops. The model is evaluated in evaluation mode, and left in the mode it was in.

    Args:
        computer: has the model with the parameters to evaluate.
        task: has the metrics.
        reader: reads the cases.
        split: the data set to evaluate on.
        limit: only the first this many cases of the data set are evaluated; None for all.
        num_workers: the number of gradient workers that share the cases.
        rank: which of them this is.
        chunk: how many cases are evaluated together.
        before: what the previous call for the same parameters returned; None for the first.

    Raises:
        DataError: a value in the data set cannot be used.
    """
    deadline = time.monotonic() + _CALL_SECONDS
    parameters = flatten(computer.parameters)
    num_cases = min(reader.num_cases(split), limit or reader.num_cases(split))
    part = worker_part(num_cases, num_workers, rank)
    done = before.num_cases if before else 0
    loss = before.loss if before else 0.0
    metrics = dict(before.metrics) if before else {}
    was_training = computer.model.training
    computer.model.eval()
    try:
        with own_passes(computer.model):
            while done < len(part):
                rows, following = part[done : done + chunk], part[done + chunk : done + 2 * chunk]
                coming = [_cases(split, following)] if following else []
                inputs, targets = reader.read(_cases(split, rows), coming)
                chunk_loss, chunk_metrics = _chunk(computer, task, inputs, targets)
                loss += chunk_loss
                for name, value in chunk_metrics.items():
                    metrics[name] = metrics.get(name, 0.0) + value
                done += len(rows)
                beat(f"{split} data, case {done}")
                if time.monotonic() > deadline:
                    break
    finally:
        computer.model.train(was_training)
    return EvaluationSums(
        num_cases=done,
        loss=loss,
        metrics=metrics,
        half_square_norm=0.5 * float(torch.dot(parameters, parameters)),
        num_left=len(part) - done,
    )


def chunk_cases(dataset: MapDataset, part_cases: int) -> int:
    """Return how many cases of `dataset` to evaluate together, from the size of its first case.

    A step computes on `part_cases` cases, so memory suffices for them, too.
    """
    inputs, _ = fetch(dataset, torch.arange(1))
    fitting = _MOST_BYTES // max(1, inputs.element_size() * inputs.numel())
    return max(1, min(_MOST_CASES, max(part_cases, fitting)))


def _cases(split: Split, rows: range) -> CaseRange:
    return CaseRange(split=split, epoch=None, start=rows.start, stop=rows.stop)


def _chunk(
    computer: BatchComputer, task: Task, inputs: Tensor, targets: Tensor
) -> tuple[float, dict[str, float]]:
    device = computer.parameters[0].device
    inputs, targets = inputs.to(device), targets.to(device)
    with torch.no_grad():
        outputs = computer.model(inputs)
        loss = computer.distribution.loss(outputs, targets).double().sum()
        metrics = {
            name: float(values.double().sum())
            for name, values in task.metrics(outputs, targets).items()
        }
    return float(loss), metrics
