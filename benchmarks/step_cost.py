"""How much does a K-FAC step cost compared with a step of SGD, and in which phases?

All optimizers train the paper's autoencoder on one thread, in turns on the same batches. Whole
periods are measured, so refreshes of the inverses, searches for gamma and measurements of the
reduction ratio occur as often as in a job. The result is CPU seconds a step.

    python benchmarks/step_cost.py --data-dir ../shared/data
    python benchmarks/step_cost.py --short
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers.first_order import gradient_step, sgd
from race import ROOT, STEPS_A_TURN, batches, conditions
from report import surroundings
from torch import Tensor

from kfac_dist import KFAC
from kfac_dist.config import JobSpec, load_spec
from kfac_dist.tasks import Task, build_model, load_task, torch_dtype

WARM_UP_STEPS = 3  # each refreshes the inverses
PHASES = {
    "gradient": "_compute",
    "statistics": "_update_factors",
    "inversion": "_invert",
    "preconditioning": "_precondition",
    "fisher_products": "_fisher_products",
    "apply": "_apply",
    "reduction_ratio": "_adapt_damping",
}
FIXED_DAMPING = {"initial": 30, "adapt_period": None}
CONSTRAINED = {"step_rule": "norm_constraint", "damping": FIXED_DAMPING}
WHOLE = {"max_factor_dim": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "adaptive, products on half of the batch": {"fisher_fraction": 0.5},
    "adaptive, whole factors, products on a quarter": {**WHOLE, "fisher_fraction": 0.25},
    "norm_constraint": CONSTRAINED,
    "norm_constraint, whole factors": {**CONSTRAINED, **WHOLE},
}


@dataclass
class Cost:
    """One optimizer, its CPU seconds, and those of its phases."""

    step: Callable[[Tensor, Tensor], object]
    seconds: float = 0.0
    phase_seconds: Counter[str] = field(default_factory=Counter)

    def take_turn(self, turn: list[tuple[Tensor, Tensor]]) -> None:
        """Run the steps of one turn."""
        started = time.process_time()
        for inputs, targets in turn:
            self.step(inputs, targets)
        self.seconds += time.process_time() - started

    def reset(self) -> None:
        """Set the seconds back to 0."""
        self.seconds = 0.0
        self.phase_seconds.clear()


def kfac(spec: JobSpec, task: Task, changes: dict[str, Any]) -> Cost:
    """Return K-FAC with the options of `spec` and some `changes`; its phases are timed."""
    options = spec.optimizer.model_dump(exclude={"name"}) | changes
    optimizer = KFAC(_model(spec, task), distribution=task.distribution, seed=spec.seed, **options)
    cost = Cost(optimizer.step)
    for phase, method in PHASES.items():
        setattr(optimizer, method, timed(getattr(optimizer, method), cost.phase_seconds, phase))
    return cost


def timed(method: Callable[..., Any], seconds: Counter[str], phase: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        started = time.process_time()
        result = method(*arguments)
        seconds[phase] += time.process_time() - started  # type: ignore[assignment]
        return result

    return run


def baseline(spec: JobSpec, task: Task) -> Cost:
    model = _model(spec, task)
    return Cost(gradient_step(model, task, sgd(lr=1e-3)(model)))


def _model(spec: JobSpec, task: Task) -> torch.nn.Module:
    return build_model(task, spec.seed, torch_dtype(spec.dtype))


def measure(
    spec: JobSpec, data_dir: Path | None, num_steps: int, variants: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the mean cost of `num_steps` steps of the variants after the warm-up."""
    task = load_task(spec, ROOT / "examples", data_dir=data_dir)
    costs = {"sgd": baseline(spec, task)}
    costs |= {name: kfac(spec, task, changes) for name, changes in variants.items()}
    source = batches(spec, task.train_data())
    warm_up = [next(source) for _ in range(WARM_UP_STEPS)]
    for cost in costs.values():
        cost.take_turn(warm_up)
        cost.reset()
    for first in range(0, num_steps, STEPS_A_TURN):
        turn = [next(source) for _ in range(min(STEPS_A_TURN, num_steps - first))]
        for cost in costs.values():
            cost.take_turn(turn)
        print(spec.batch_size, {n: round(c.seconds, 2) for n, c in costs.items()}, file=sys.stderr)
    return {
        **conditions(spec),
        "steps": num_steps,
        "optimizers": {
            name: report(cost, num_steps, costs["sgd"].seconds) for name, cost in costs.items()
        },
    }


def report(cost: Cost, num_steps: int, sgd_seconds: float) -> dict[str, Any]:
    return {
        "seconds": round(cost.seconds / num_steps, 4),
        "step_over_sgd": round(cost.seconds / sgd_seconds, 3),
        "phases_over_sgd": {
            phase: round(seconds / sgd_seconds, 3) for phase, seconds in cost.phase_seconds.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--batch-size", type=int, action="append", help="default: 1000 and 4000")
    parser.add_argument("--steps", type=int, default=40, help="a multiple of 20, the period")
    parser.add_argument("--short", action="store_true", help="the demo's job, 20 steps of 500")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="repeatable")
    arguments = parser.parse_args()
    variants = {name: VARIANTS[name] for name in arguments.variant or VARIANTS}
    torch.set_num_threads(1)
    path = ROOT / f"examples/{'mnist_5k' if arguments.short else 'mnist_autoencoder'}.yaml"
    sizes = [500] if arguments.short else arguments.batch_size or [1000, 4000]
    num_steps = 20 if arguments.short else arguments.steps
    started, runs = surroundings(), []
    for size in sizes:
        spec = load_spec(path, overrides=[f"batch_size={size}"])
        runs.append(measure(spec, arguments.data_dir, num_steps, variants))
    result = {
        "question": "CPU seconds of a step compared with one of SGD, one thread, by phase",
        **started,
        "runs": runs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
