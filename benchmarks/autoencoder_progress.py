"""How fast does the objective of the paper's autoencoder fall, by step and by CPU second?

K-FAC against SGD with Nesterov momentum and Adam: one process, one thread, the same initial
parameters and the same batches; the optimizers take turns of a few steps, so that a machine that
slows down slows all of them. CPU time counts the steps alone, not the evaluations.

    python benchmarks/autoencoder_progress.py --data-dir ../shared/data --steps 500
    python benchmarks/autoencoder_progress.py --short
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.config import JobSpec, load_spec
from kfac_dist.coordination.sampling import SamplerCursor, next_window
from kfac_dist.core.distributions import get_distribution
from kfac_dist.core.sampling import permutation
from kfac_dist.data import MapDataset, fetch
from kfac_dist.tasks import Task, build_model, load_task

ROOT = Path(__file__).resolve().parent.parent
STEPS_A_TURN = 10
LEARNING_RATES = {"sgd": 1e-3, "adam": 1e-3}


@dataclass
class Contestant:
    """One optimizer with its own copy of the model, its CPU seconds and its curve."""

    name: str
    model: nn.Module
    step: Callable[[Tensor, Tensor], object]
    cpu_seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def contestants(spec: JobSpec, task: Task) -> list[Contestant]:
    found = []
    for name in ("kfac", "sgd", "adam"):
        model = build_model(task, spec.seed, torch.float32)
        if name == "kfac":
            options = spec.optimizer.model_dump(exclude={"name"})
            step: Callable[..., object] = KFAC(
                model, distribution=task.distribution, seed=spec.seed, **options
            ).step
        else:
            step = first_order_step(name, model, task.distribution)
        found.append(Contestant(name=name, model=model, step=step))
    return found


def first_order_step(name: str, model: nn.Module, distribution: str) -> Callable[..., object]:
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, lr=LEARNING_RATES[name], momentum=0.9, nesterov=True)
        if name == "sgd"
        else torch.optim.Adam(parameters, lr=LEARNING_RATES[name])
    )
    predictive = get_distribution(distribution)

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        predictive.loss(model(inputs), targets).mean().backward()
        optimizer.step()

    return step


def batches(spec: JobSpec, data: MapDataset) -> Iterator[tuple[Tensor, Tensor]]:
    assert isinstance(spec.batch_size, int)
    cursor = SamplerCursor(epoch=0, offset=0)
    while True:
        window, cursor = next_window(cursor, spec.batch_size, len(data))
        order = permutation(spec.seed, window.epoch, len(data))
        yield fetch(data, order[window.start : window.stop])


def evaluate(model: nn.Module, task: Task, data: MapDataset) -> dict[str, float]:
    loss, squared_error = 0.0, 0.0
    predictive = get_distribution(task.distribution)
    with torch.no_grad():
        for indices in torch.arange(len(data)).split(1000):
            inputs, targets = fetch(data, indices)
            outputs = model(inputs)
            loss += float(predictive.loss(outputs, targets).double().sum())
            squared_error += float(task.metrics(outputs, targets)["squared_error"].double().sum())
    return {"loss": loss / len(data), "squared_error": squared_error / len(data)}


def race(spec: JobSpec, data_dir: Path | None, evaluate_every: int) -> list[Contestant]:
    task = load_task(spec, ROOT / "examples", data_dir=data_dir)
    data = task.train_data()
    field_ = contestants(spec, task)
    source = batches(spec, data)
    for first in range(0, spec.steps, STEPS_A_TURN):
        turn = [next(source) for _ in range(min(STEPS_A_TURN, spec.steps - first))]
        for contestant in field_:
            start = time.process_time()
            for inputs, targets in turn:
                contestant.step(inputs, targets)
            contestant.cpu_seconds += time.process_time() - start
        done = first + len(turn)
        if done % evaluate_every == 0 or done == spec.steps:
            for contestant in field_:
                point = {"step": done, "cpu_seconds": round(contestant.cpu_seconds, 2)}
                contestant.curve.append(point | evaluate(contestant.model, task, data))
    return field_


def report(spec: JobSpec, field_: list[Contestant]) -> dict[str, Any]:
    sgd = next(contestant for contestant in field_ if contestant.name == "sgd")
    return {
        "question": "objective by step and by CPU second, full training set, nats a case",
        "job": spec.name,
        "seed": spec.seed,
        "batch_size": spec.batch_size,
        "learning_rates": LEARNING_RATES,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "step_over_sgd": {c.name: round(c.cpu_seconds / sgd.cpu_seconds, 3) for c in field_},
        "curves": {c.name: c.curve for c in field_},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, default=ROOT / "examples/mnist_autoencoder.yaml")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--evaluate-every", type=int, default=50)
    parser.add_argument("--short", action="store_true", help="the demo's job, 100 steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = ROOT / "examples/mnist_5k.yaml" if arguments.short else arguments.spec
    steps = arguments.steps or (100 if arguments.short else None)
    spec = load_spec(path, overrides=[f"steps={steps}"] if steps else [])
    field_ = race(spec, arguments.data_dir, arguments.evaluate_every)
    print(json.dumps(report(spec, field_)))


if __name__ == "__main__":
    main()
