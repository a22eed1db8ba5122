"""How fast does the objective of the paper's autoencoder fall, by step and by CPU second?

K-FAC against SGD with Nesterov momentum and Adam, one process, one thread.

    python benchmarks/autoencoder_progress.py --data-dir ../shared/data --steps 500
    python benchmarks/autoencoder_progress.py --short
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from race import ROOT, MakeStep, Step, conditions, race
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.config import JobSpec, load_spec
from kfac_dist.core.distributions import get_distribution
from kfac_dist.tasks import Task

LEARNING_RATES = {"sgd": 1e-3, "adam": 1e-3}


def contestants(spec: JobSpec) -> dict[str, MakeStep]:
    options = spec.optimizer.model_dump(exclude={"name"})

    def kfac(model: nn.Module, task: Task) -> Step:
        return KFAC(model, distribution=task.distribution, seed=spec.seed, **options).step

    return {"kfac": kfac, "sgd": first_order(sgd), "adam": first_order(adam)}


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LEARNING_RATES["sgd"], momentum=0.9, nesterov=True)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=LEARNING_RATES["adam"])


def first_order(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> MakeStep:
    def make_step(model: nn.Module, task: Task) -> Step:
        optimizer = make(list(model.parameters()))
        predictive = get_distribution(task.distribution)

        def step(inputs: Tensor, targets: Tensor) -> None:
            optimizer.zero_grad()
            predictive.loss(model(inputs), targets).mean().backward()
            optimizer.step()

        return step

    return make_step


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
    field = race(spec, contestants(spec), arguments.data_dir, arguments.evaluate_every)
    (sgd_seconds,) = (one.cpu_seconds for one in field if one.name == "sgd")
    result = {
        "question": "objective by step and by CPU second, full training set, nats a case",
        **conditions(spec),
        "seed": spec.seed,
        "learning_rates": LEARNING_RATES,
        "step_over_sgd": {one.name: round(one.cpu_seconds / sgd_seconds, 3) for one in field},
        "curves": {one.name: one.curve for one in field},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
