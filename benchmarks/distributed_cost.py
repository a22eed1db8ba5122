"""How long does a distributed step on one host take, compared with a serial one on the same cores?

One gradient worker, one inverse worker and the parameter server are compared with `kfac_dist.KFAC`
in one process. They run in turns on the same batches; a turn is a whole period of refresh and of
the search for gamma. The result is wall seconds a step, including the driver's work, for three ways
to share the cores:

`one core`: all roles on one core; serial with one thread.
`all threads`: gradient worker and server with as many threads as there are cores; serial as well.
`own core`: gradient worker and server with one thread, the inverse worker on another core; serial
with one thread.

    python benchmarks/distributed_cost.py --data-dir ../shared/data --out benchmarks/results
    python benchmarks/distributed_cost.py --short
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from race import ROOT, batches, conditions
from report import add_output_options, deliver, document, surroundings, table
from turns import WITHOUT_EXTRAS, Turns, on_cores, run_turns

from kfac_dist import KFAC
from kfac_dist.config import JobSpec, load_spec
from kfac_dist.tasks import build_model, load_task, torch_dtype

PERIOD = 20
SERIAL_PHASES = {
    "compute": "_compute",
    "statistics": "_update_factors",
    "inversion": "_invert",
    "precondition": "_precondition",
    "fisher_products": "_fisher_products",
    "apply": "_apply",
    "measure": "_adapt_damping",
}


class Layout(NamedTuple):
    """How roles share cores: the number of cores, and the threads of a gradient worker."""

    num_cores: int
    threads: int


LAYOUTS = {"one core": Layout(1, 1), "all threads": Layout(2, 2), "own core": Layout(2, 1)}


class Serial:
    """The serial optimizer on the batches of the job, with its phases timed."""

    def __init__(self, spec: JobSpec, data_dir: Path | None) -> None:
        task = load_task(spec, ROOT / "examples", data_dir=data_dir)
        model = build_model(task, spec.seed, torch_dtype(spec.dtype))
        options = spec.optimizer.model_dump(exclude={"name"})
        self._optimizer = KFAC(model, distribution=task.distribution, seed=spec.seed, **options)
        self._batches = batches(spec, task.train_data())
        self.phase_seconds: Counter[str] = Counter()
        for phase, method in SERIAL_PHASES.items():
            timed = self._timed(phase, getattr(self._optimizer, method))
            setattr(self._optimizer, method, timed)
        self.num_steps = 0
        self.seconds = 0.0

    def _timed(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = method(*arguments)
            self.phase_seconds[phase] += time.perf_counter() - started  # type: ignore[assignment]
            return result

        return run

    def take_turn(self, steps: range) -> None:
        """Run these steps; those of the warm-up, which begins with step 1, are not counted."""
        started = time.perf_counter()
        for _ in steps:
            self._optimizer.step(*next(self._batches))
        if steps.start == 1:
            self.phase_seconds.clear()
            return
        self.seconds += time.perf_counter() - started
        self.num_steps += len(steps)


def measure(
    spec: JobSpec, layout: Layout, cores: list[int], data_dir: Path | None
) -> dict[str, Any]:
    torch.set_num_threads(layout.threads)
    serial = Serial(spec, data_dir)
    turns = Turns(first=PERIOD, steps_a_turn=PERIOD, between=serial.take_turn)
    with on_cores(set(cores[-layout.num_cores :])):
        run_turns(spec, data_dir, turns)
    per_step = serial.seconds / serial.num_steps
    return {
        "cores": layout.num_cores,
        "threads": layout.threads,
        "steps": serial.num_steps,
        "serial_seconds": round(per_step, 4),
        "distributed_seconds": round(turns.step_seconds, 4),
        "distributed_over_serial": round(turns.step_seconds / per_step, 3),
        "serial_phases_over_step": {
            phase: round(seconds / serial.seconds, 4)
            for phase, seconds in serial.phase_seconds.items()
        },
        "distributed_phases_over_serial_step": {
            phase: round(seconds / per_step, 4) for phase, seconds in turns.phase_seconds().items()
        },
        "distributed_cpu_over_serial_step": {
            role: round(seconds / len(turns.records) / per_step, 4)
            for role, seconds in turns.cpu_seconds.items()
        },
        "waited_seconds": round(sum(record.waited_seconds for record in turns.records), 4),
    }


def markdown(result: dict[str, Any]) -> str:
    runs = result["layouts"]
    header = ["layout", "serial, s", "distributed, s", "distributed over serial"]
    rows = [
        [n, r["serial_seconds"], r["distributed_seconds"], f"**{r['distributed_over_serial']}**"]
        for n, r in runs.items()
    ]
    phases = dict.fromkeys(
        p for r in runs.values() for p in r["distributed_phases_over_serial_step"]
    )
    cells = [
        [
            phase,
            *(
                f"{r['serial_phases_over_step'].get(phase, 0):.3f} / "
                f"{r['distributed_phases_over_serial_step'].get(phase, 0):.3f}"
                for r in runs.values()
            ),
        ]
        for phase in phases
    ]
    return document(
        "A distributed step on one host next to a serial one",
        "`python benchmarks/distributed_cost.py --data-dir DIR --out benchmarks/results`: "
        f"{result['job']}, batch {result['batch_size']}, one gradient worker, one asynchronous "
        f"inverse worker, the parameter server, float32, torch {result['versions']['torch']}, "
        f"Ray {result['versions']['ray']}, {result['hardware']['cores']} cores. Wall time of a "
        f"step, driver included, in turns of {PERIOD} steps with the serial optimizer on as many "
        "cores and threads.",
        table(header, rows),
        "Phases, serial / distributed, as shares of a serial step. In a distributed run "
        "`precondition` runs in parallel with `statistics`; the gradient worker waits for the rest "
        "of it in `wait_direction`. `inversion` runs in the inverse worker, in parallel with the "
        "step. `reduce` and `broadcast` are the time of sending, without the time of waiting for "
        "the other side.",
        table(["phase", *runs], cells),
        "CPU seconds by process, as shares of a serial step's wall time.",
        table(["process", *runs], _cpu_cells(runs)),
    )


def _cpu_cells(runs: dict[str, Any]) -> list[list[object]]:
    name = "distributed_cpu_over_serial_step"
    roles = dict.fromkeys(role for run in runs.values() for role in run[name])
    return [[role, *(run[name].get(role, 0) for run in runs.values())] for role in roles]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output_options(parser)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--set", action="append", default=[], help="an override, as in the CLI")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    turns = 1 if arguments.short else arguments.turns
    path = ROOT / f"examples/{'mnist_5k' if arguments.short else 'mnist_autoencoder'}.yaml"
    steps = PERIOD * (turns + 1) - 1
    result: dict[str, Any] = {
        "question": "wall seconds of a distributed step over a serial one on the same cores",
    }
    started, runs = surroundings(), {}
    for name in arguments.layout or LAYOUTS:
        layout = LAYOUTS[name]
        if layout.num_cores > len(cores):
            print(f"{name} needs {layout.num_cores} cores, left out", file=sys.stderr)
            continue
        overrides = [
            f"steps={steps}",
            "workers.gradient=1",
            f"workers.threads={layout.threads}",
            *WITHOUT_EXTRAS,
            *arguments.set,
        ]
        spec = load_spec(path, overrides=overrides)
        runs[name] = measure(spec, layout, cores, arguments.data_dir)
        print(name, runs[name], file=sys.stderr)
    result |= {**conditions(spec), **started, "seed": spec.seed, "turns": turns, "layouts": runs}
    deliver("distributed_cost", result, markdown(result), arguments.out)


if __name__ == "__main__":
    main()
