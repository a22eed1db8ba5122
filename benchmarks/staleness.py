"""How much progress does staleness of the inverses cost, and how much of it does a warm-up save?

Serial K-FAC with scripted delays takes the steps of a distributed run with the same
`staleness.delay_steps` and `staleness.warmup_steps`, to the last bit. All variants have the same
initial parameters and batches, for several seeds; the baseline is the synchronous run. The job is
the demo's net on the real MNIST, which is small enough for many runs.

    python benchmarks/staleness.py --data-dir ../shared/data --out benchmarks/results
    python benchmarks/staleness.py --short
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import mean
from typing import Any, NamedTuple

import torch
from race import ROOT, Contestant, MakeStep, Step, conditions, race
from report import add_output_options, deliver, document, surroundings, table
from torch import nn

from kfac_dist import KFAC
from kfac_dist.config import JobSpec, KFACSpec, load_spec
from kfac_dist.coordination.steps.staleness import StalenessBound
from kfac_dist.core.vector import flatten
from kfac_dist.optim.schedules import kfac_schedule
from kfac_dist.tasks import Task

SYNCHRONOUS = "synchronous"
REAL_MNIST = ["data.name=mnist", "batch_size=500", "optimizer.fisher_fraction=1.0"]


class Variant(NamedTuple):
    """A scripted run; without a delay it is the synchronous one."""

    delay_steps: int
    warmup_steps: int

    @property
    def name(self) -> str:
        """Its name in tables."""
        if not self.delay_steps:
            return SYNCHRONOUS
        return f"delay {self.delay_steps}, warm-up {self.warmup_steps}"

    def mean_staleness(self, settings: KFACSpec, num_steps: int) -> float:
        """Return the mean of `inverse_staleness_steps` over the run."""
        bound = StalenessBound(
            max_steps=0,
            warmup_steps=self.warmup_steps,
            schedule=kfac_schedule(settings),
            delay_steps={"*": self.delay_steps},
        )
        return mean(s - bound.oldest_admissible(s, "any") for s in range(1, num_steps + 1))


VARIANTS = [
    Variant(0, 0),
    Variant(20, 0),
    Variant(20, 20),
    Variant(20, 60),
    Variant(100, 0),
    Variant(100, 60),
    Variant(100, 120),
]
SHORT_VARIANTS = [Variant(0, 0), Variant(5, 0), Variant(5, 10)]


def maker(spec: JobSpec, variant: Variant) -> MakeStep:
    options = spec.optimizer.model_dump(exclude={"name"})

    def make(model: nn.Module, task: Task) -> Step:
        optimizer = KFAC(
            model,
            distribution=task.distribution,
            seed=spec.seed,
            delay_steps={"*": variant.delay_steps},
            warmup_steps=variant.warmup_steps,
            **options,
        )
        return optimizer.step

    return make


def objective(spec: JobSpec, contestant: Contestant) -> float:
    """Return the loss on the whole training set at the end, with the l2 term."""
    theta = flatten(list(contestant.model.parameters()))
    return contestant.curve[-1]["loss"] + 0.5 * spec.optimizer.l2 * float(theta @ theta)


def run_seed(
    spec: JobSpec, variants: Sequence[Variant], arguments: argparse.Namespace
) -> dict[str, Any]:
    makers = {variant.name: maker(spec, variant) for variant in variants}
    field = race(spec, makers, arguments.data_dir, max(1, spec.steps // 10))
    objectives = {contestant.name: objective(spec, contestant) for contestant in field}
    print(spec.seed, objectives, file=sys.stderr)
    return {
        "seed": spec.seed,
        "objective": objectives,
        "over_synchronous": {
            name: round(value / objectives[SYNCHRONOUS], 4) for name, value in objectives.items()
        },
        "curves": {contestant.name: contestant.curve for contestant in field},
    }


def summary(
    spec: JobSpec, variants: Sequence[Variant], runs: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    assert isinstance(spec.optimizer, KFACSpec)
    rows = []
    for variant in variants:
        ratios = [run["over_synchronous"][variant.name] for run in runs]
        rows.append(
            {
                "variant": variant.name,
                "mean_staleness_steps": round(
                    variant.mean_staleness(spec.optimizer, spec.steps), 1
                ),
                "objective": round(mean(run["objective"][variant.name] for run in runs), 3),
                "over_synchronous": {
                    "mean": round(mean(ratios), 4),
                    "min": min(ratios),
                    "max": max(ratios),
                },
            }
        )
    return rows


def markdown(result: dict[str, Any]) -> str:
    rows = [
        [
            row["variant"],
            row["mean_staleness_steps"],
            row["objective"],
            f"**{row['over_synchronous']['mean']:.3f}**",
            f"{row['over_synchronous']['min']:.3f} to {row['over_synchronous']['max']:.3f}",
        ]
        for row in result["variants"]
    ]
    header = ["run", "mean staleness, steps", "objective", "over synchronous", "seeds"]
    return document(
        "What staleness of the inverses costs in progress",
        f"`python benchmarks/staleness.py --data-dir DIR --out benchmarks/results`: "
        f"{result['job']}, data {result['data']['name']}, batch {result['batch_size']}, "
        f"{result['steps']} steps, {len(result['runs'])} seeds, refresh every "
        f"{result['inverse_update_period']} steps, float32, torch {result['versions']['torch']}. "
        "Objective on the whole training set, l2 term included, in nats a case.",
        "After the warm-up, each refresh is used exactly this many steps late. A run without delay "
        "is synchronous. Its inverses age between two refreshes as well, which counts as "
        "staleness.",
        table(header, rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output_options(parser)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="an override, as in the CLI")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps, seeds = (40, 1) if arguments.short else (arguments.steps, arguments.seeds)
    variants = SHORT_VARIANTS if arguments.short else VARIANTS
    overrides = [f"steps={steps}", *([] if arguments.short else REAL_MNIST), *arguments.set]
    started = surroundings()
    runs = []
    for seed in range(seeds):
        spec = load_spec(ROOT / "examples/mnist_5k.yaml", overrides=[*overrides, f"seed={seed}"])
        runs.append(run_seed(spec, variants, arguments))
    assert isinstance(spec.optimizer, KFACSpec)
    result = {
        "question": "objective after `steps` steps, by staleness and warm-up, over synchronous",
        **conditions(spec),
        **started,
        "data": spec.data.model_dump(),
        "steps": steps,
        "inverse_update_period": spec.optimizer.inverse_update_period,
        "variants": summary(spec, variants, runs),
        "runs": runs,
    }
    deliver("staleness", result, markdown(result), arguments.out)


if __name__ == "__main__":
    main()
