"""A race by steps: optimizers with the same initial parameters and batches, in turns.

A turn is a few steps, so a machine that slows down slows all of them. CPU time includes the steps
but not the evaluations. All contestants do the same number of steps; in `timed_race.py` they have
the same CPU time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.config import JobSpec
from kfac_dist.coordination.steps.sampling import SamplerCursor, next_window
from kfac_dist.core.passes.distributions import get_distribution
from kfac_dist.core.passes.noise import permutation
from kfac_dist.data import MapDataset, fetch
from kfac_dist.tasks import Task, build_model, load_task, torch_dtype
from workers.planning import batch_size

ROOT = Path(__file__).resolve().parent.parent
STEPS_A_TURN = 10

Step = Callable[[Tensor, Tensor], object]
MakeStep = Callable[[nn.Module, Task], Step]


@dataclass
class Contestant:
    """One optimizer with its own copy of the model, its CPU seconds and its curve."""

    name: str
    model: nn.Module
    step: Step
    cpu_seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def race(
    spec: JobSpec, makers: Mapping[str, MakeStep], data_dir: Path | None, evaluate_every: int
) -> list[Contestant]:
    """Run all contestants for the steps of `spec`, evaluated on the whole training set."""
    task = load_task(spec, ROOT / "examples", data_dir=data_dir)
    data = task.train_data()
    contestants = []
    for name, make_step in makers.items():
        model = build_model(task, spec.seed, torch_dtype(spec.dtype))
        contestants.append(Contestant(name=name, model=model, step=make_step(model, task)))
    source = batches(spec, data)
    for first in range(0, spec.steps, STEPS_A_TURN):
        turn = [next(source) for _ in range(min(STEPS_A_TURN, spec.steps - first))]
        for contestant in contestants:
            take_turn(contestant, turn)
        done = first + len(turn)
        if done % evaluate_every == 0 or done == spec.steps:
            for contestant in contestants:
                point = {"step": done, "cpu_seconds": round(contestant.cpu_seconds, 2)}
                contestant.curve.append(point | evaluate(contestant.model, task, data))
    return contestants


def take_turn(contestant: Contestant, turn: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Run the steps of one turn with a contestant."""
    start = time.process_time()
    for inputs, targets in turn:
        contestant.step(inputs, targets)
    contestant.cpu_seconds += time.process_time() - start


def batches(spec: JobSpec, data: MapDataset) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a job, with its order and its sizes."""
    cursor = SamplerCursor(epoch=0, offset=0)
    epoch, order = -1, torch.empty(0)
    for step in itertools.count(1):
        window, cursor = next_window(cursor, batch_size(spec, step, len(data)), len(data))
        if window.epoch != epoch:
            epoch, order = window.epoch, permutation(spec.seed, window.epoch, len(data))
        yield fetch(data, order[window.start : window.stop])


def evaluate(model: nn.Module, task: Task, data: MapDataset) -> dict[str, float]:
    """Return the mean loss, in nats a case, and the task's metrics."""
    sums: dict[str, float] = {}
    predictive = get_distribution(task.distribution)
    with torch.no_grad():
        for indices in torch.arange(len(data)).split(1000):
            inputs, targets = fetch(data, indices)
            outputs = model(inputs)
            values = {"loss": predictive.loss(outputs, targets)} | dict(
                task.metrics(outputs, targets)
            )
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value.double().sum())
    return {name: total / len(data) for name, total in sums.items()}


def conditions(spec: JobSpec) -> dict[str, Any]:
    """Return what is needed to repeat a run, besides `report.surroundings`."""
    return {
        "job": spec.name,
        "batch_size": spec.model_dump()["batch_size"],
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
