"""Does the block-tridiagonal inverse make more progress a step than the block-diagonal one?

Both train the paper's autoencoders from the same initial parameters, with the same batches and
options, for several seeds. `steps_saved` is the share of steps that the block-tridiagonal run saves
on the way to the higher of the two final losses; the paper reports 25 to 40 %.

    python benchmarks/structures.py --data-dir ../shared/data
    python benchmarks/structures.py --short
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from race import ROOT, Contestant, MakeStep, Step, conditions, race
from report import surroundings
from torch import nn

from kfac_dist import KFAC
from kfac_dist.config import JobSpec, load_spec
from kfac_dist.tasks import Task

STRUCTURES = ("block_diagonal", "block_tridiagonal")


def contestants(spec: JobSpec) -> dict[str, MakeStep]:
    options = spec.optimizer.model_dump(exclude={"name", "inverse"})

    def maker(inverse: str) -> MakeStep:
        def make(model: nn.Module, task: Task) -> Step:
            return KFAC(
                model,
                distribution=task.distribution,
                seed=spec.seed,
                inverse=inverse,
                **options,
            ).step

        return make

    return {inverse: maker(inverse) for inverse in STRUCTURES}


def steps_to(curve: list[dict[str, float]], loss: float) -> float:
    """Return the step at which a falling curve reaches `loss`, interpolated linearly."""
    losses = np.minimum.accumulate([point["loss"] for point in curve])
    return float(np.interp(-loss, -losses, [point["step"] for point in curve]))


def compare(seed: int, field: list[Contestant]) -> dict[str, Any]:
    diagonal, tridiagonal = (contestant.curve for contestant in field)
    goal = max(diagonal[-1]["loss"], tridiagonal[-1]["loss"])
    saved = 1 - steps_to(tridiagonal, goal) / steps_to(diagonal, goal)
    return {
        "seed": seed,
        "goal": goal,
        "steps_saved": round(saved, 3),
        "step_over_block_diagonal": round(field[1].cpu_seconds / field[0].cpu_seconds, 3),
        "curves": {contestant.name: contestant.curve for contestant in field},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, action="append")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluate-every", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], help="an override, as in the CLI")
    parser.add_argument("--short", action="store_true", help="the demo's job, 40 steps, one seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    named = [ROOT / f"examples/{name}_autoencoder.yaml" for name in ("mnist", "curves")]
    paths = [ROOT / "examples/mnist_5k.yaml"] if arguments.short else arguments.spec or named
    steps, seeds = (40, 1) if arguments.short else (arguments.steps, arguments.seeds)
    started, results = surroundings(), []
    for path in paths:
        runs = []
        for seed in range(seeds):
            overrides = [f"steps={steps}", f"seed={seed}", "batch_size=1000", *arguments.set]
            spec = load_spec(path, overrides=overrides)
            field = race(spec, contestants(spec), arguments.data_dir, arguments.evaluate_every)
            runs.append(compare(seed, field))
            print(spec.name, seed, runs[-1]["steps_saved"], file=sys.stderr)
        results.append({**conditions(spec), "steps": steps, "runs": runs})
    question = "progress a step by structure of the inverse"
    print(json.dumps({"question": question, **started, "jobs": results}))


if __name__ == "__main__":
    main()
