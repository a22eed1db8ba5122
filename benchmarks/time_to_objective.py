r"""How much CPU time does each optimizer need to reach an objective on the paper's autoencoder?

The serial K-FAC against SGD, Adam, Muon, SOAP, Shampoo and kfac-jax. All have the same initial
parameters, the same order of cases and one thread, and run in turns, after a search over a grid for
every peer. The objective is the cross-entropy over the whole training set. SGD always runs too, so
that a run can be done in parts: seconds of different runs are compared in steps of SGD.

    python benchmarks/time_to_objective.py --data-dir ../shared/data --results FILE.json
    python benchmarks/time_to_objective.py --data-dir ../shared/data --results FILE.json \
        --only kfac=120 --only kfac-jax=240
    python benchmarks/time_to_objective.py --short

A whole run takes 180 CPU seconds for each contestant, and about half as much for evaluations. Run
it with OMP_NUM_THREADS=1 and on one core (`taskset -c 1`). SOAP, Shampoo and kfac-jax are in the
extra `peers`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peers.comparison import compare, compare_jobs, table
from peers.distributed import jobs, run_job
from peers.field import FIELD, Options
from race import ROOT, conditions
from report import surroundings
from timed_race import Entrant, Setting, enter, race_by_time, score

from kfac_dist.config import load_spec

BASELINE = "sgd"
BASELINE_SHARE = 1 / 8  # of the largest budget, for SGD where it is not itself chosen
NUM_TURNS, NUM_TUNING_TURNS = 45, 5
PACKAGES = {"pytorch_optimizer": "pytorch-optimizer", "kfac_jax": "kfac-jax"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The CPU seconds of each contestant, and of each setting of a grid that is tried."""

    budgets: Mapping[str, float]
    tuning_seconds: float


def tune(setting: Setting, name: str, seconds: float) -> dict[str, Any]:
    """Try each setting of a contestant's grid for `seconds`, in turns; the lowest loss is best."""
    grid = FIELD[name].grid
    if seconds == 0 or len(grid) == 1:
        return {"seconds": 0, "tried": [], "best": grid[0]}
    entrants = [
        enter(setting, str(options), FIELD[name].start(setting, options), seconds, 1)
        for options in grid
    ]
    race_by_time(setting, entrants, NUM_TUNING_TURNS)
    tried = [
        {"options": options, "steps": entrant.steps, **entrant.curve[-1]}
        for options, entrant in zip(grid, entrants, strict=True)
    ]
    best = min(tried, key=score)["options"]
    say(f"{name}: {[(trial['options'], score(trial)) for trial in tried]}")
    return {"seconds": seconds, "tried": tried, "best": best}


def run(setting: Setting, plan: Plan, tuned: Mapping[str, Options]) -> dict[str, Any]:
    """Race the contestants of a plan together with SGD."""
    budgets = {BASELINE: max(plan.budgets.values()) * BASELINE_SHARE} | dict(plan.budgets)
    entrants = [
        enter(
            setting,
            name,
            FIELD[name].start(setting, tuned[name]),
            budget,
            FIELD[name].evaluations if name in plan.budgets else 1,
        )
        for name, budget in budgets.items()
    ]
    race_by_time(setting, entrants, NUM_TURNS)
    (baseline,) = (entrant for entrant in entrants if entrant.name == BASELINE)
    return {
        "load_average": os.getloadavg(),
        "sgd_step_seconds": round(baseline.seconds_a_step, 4),
        "entrants": {
            entrant.name: outcome(entrant, tuned[entrant.name])
            for entrant in entrants
            if entrant.name in plan.budgets
        },
    }


def outcome(entrant: Entrant, options: Options) -> dict[str, Any]:
    say(f"{entrant.name}: {entrant.steps} steps, {score(entrant.curve[-1]):.2f}")
    return {
        "ours": FIELD[entrant.name].ours,
        "options": options,
        "budget_seconds": entrant.budget,
        "steps": entrant.steps,
        "seconds_a_step": round(entrant.seconds_a_step, 4),
        "diverged": entrant.diverged,
        "curve": entrant.curve,
    }


def measure(setting: Setting, plan: Plan, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the stored results with those of a plan added; our own grids are searched again."""
    tuning = dict(stored.get("tuning", {}))
    for name in {BASELINE: 0, **plan.budgets}:
        if name not in tuning or FIELD[name].ours:
            tuning[name] = tune(setting, name, plan.tuning_seconds)
    runs = list(stored.get("runs", []))
    if plan.budgets:
        runs.append(run(setting, plan, {name: found["best"] for name, found in tuning.items()}))
    names = {name for name, member in FIELD.items() if member.needs and member.installed}
    return {
        **stored,
        "question": "CPU seconds to an objective: cross-entropy over the training set, nats a case",
        **conditions(setting.spec),
        **surroundings(),
        "packages": {PACKAGES[m]: version(PACKAGES[m]) for m in {FIELD[n].needs for n in names}},
        "seed": setting.spec.seed,
        "tuning": tuning,
        "runs": runs,
        "comparison": compare(runs),
    }


def measure_jobs(setting: Setting, steps: int, data_dir: Path | None, tuning: Any) -> Any:
    """Return the curves of whole jobs, of K-FAC and the baselines, and compare them."""
    rates = {name: tuning[name]["best"]["lr"] for name in ("sgd", "adam")}
    curves = {}
    for name, spec in jobs(setting.spec, rates, steps).items():
        curves[name] = run_job(spec, data_dir)
        say(f"distributed {name}: {curves[name]['curve'][-1]}")
    return {
        "load_average": os.getloadavg(),
        "learning_rates": rates,
        "jobs": curves,
        "comparison": compare_jobs({name: found["curve"] for name, found in curves.items()}),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def chosen(only: list[str], budget: float) -> dict[str, float]:
    """Return the budgets of the contestants in `only`, NAME or NAME=SECONDS.

    Without any, return those of all installed contestants. A wrong name or number is a SystemExit
    that names it and the legal values.
    """
    budgets = {}
    for text in only:
        name, _, seconds = text.partition("=")
        if name not in FIELD:
            raise SystemExit(f"--only {text}: {name!r} is not one of {', '.join(FIELD)}")
        try:
            budgets[name] = float(seconds) if seconds else budget
        except ValueError:
            raise SystemExit(f"--only {text}: {seconds!r} is not a number of CPU seconds") from None
    for name in budgets or FIELD:
        if not FIELD[name].installed:
            say(f"{name}: {FIELD[name].needs} is not installed; pip install 'kfac-dist[peers]'")
            budgets.pop(name, None)
        elif not only:
            budgets[name] = budget
    return budgets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", type=Path, default=ROOT / "examples/mnist_autoencoder.yaml")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--budget", type=float, help="CPU seconds of each contestant (180)")
    parser.add_argument("--tuning-seconds", type=float, help="a setting of a grid (25); 0: none")
    parser.add_argument("--only", action="append", default=[], metavar="NAME[=SECONDS]")
    parser.add_argument("--tune-only", action="store_true", help="search the grids and stop")
    parser.add_argument(
        "--distributed", type=int, metavar="STEPS", help="run whole jobs on workers"
    )
    parser.add_argument("--results", type=Path, help="add to the results in this file")
    parser.add_argument("--table", action="store_true", help="print the stored results as Markdown")
    parser.add_argument("--short", action="store_true", help="run the demo's net, 5 seconds each")
    arguments = parser.parse_args()
    stored = {}
    if arguments.results and arguments.results.exists():
        stored = json.loads(arguments.results.read_text())
    if arguments.table:
        print(table(stored))
        return
    short = arguments.short
    path = ROOT / "examples/mnist_5k.yaml" if short else arguments.spec
    setting = Setting.load(load_spec(path), path.parent, arguments.data_dir)
    budgets = chosen(arguments.only, arguments.budget or (5 if short else 180))
    seconds = arguments.tuning_seconds
    plan = Plan(
        budgets=budgets, tuning_seconds=(0 if short else 25) if seconds is None else seconds
    )
    if arguments.tune_only:
        tuning = {name: tune(setting, name, plan.tuning_seconds) for name in budgets}
        result = {**stored, "tuning": stored.get("tuning", {}) | tuning}
    elif arguments.distributed:
        tuning = {name: tune(setting, name, 0) for name in ("sgd", "adam")}
        tuning |= stored.get("tuning", {})
        found = measure_jobs(setting, arguments.distributed, arguments.data_dir, tuning)
        result = {**stored, **conditions(setting.spec), **surroundings(), "distributed": found}
    else:
        result = measure(setting, plan, stored)
    text = json.dumps(result)
    if arguments.results:
        arguments.results.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
