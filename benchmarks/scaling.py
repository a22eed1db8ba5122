"""Weak scaling over gradient workers: each has a batch of the same size. What does a step send?

Whole jobs run on the project's workers, with one gradient worker and with more, in turns. A round
is one period of refresh and of the search for gamma. The efficiency is the time of a step with one
worker over that with several. The ceiling of the machine is measured next to it: the efficiency of
the same number of processes that compute gradients and Fisher products without exchanging anything.
Cores that are threads of one physical core have a low ceiling.

    python benchmarks/scaling.py --data-dir ../shared/data --out benchmarks/results
    python benchmarks/scaling.py --short
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from race import ROOT, batches, conditions
from report import add_output_options, deliver, document, surroundings, table
from turns import WITHOUT_EXTRAS, Turns, run_turns

from kfac_dist.config import JobSpec, KFACSpec, load_spec
from kfac_dist.core.blocks.registration import Registration, register
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.packing import packed_size
from kfac_dist.core.passes.distributions import get_distribution
from kfac_dist.tasks import build_model, load_task, torch_dtype
from workers.cluster.cluster import ray_cluster

PERIOD = 20
ALONE_STEPS = 5


def job(path: Path, num_workers: int, batch_size: int, extra: Sequence[str]) -> JobSpec:
    overrides = [
        f"workers.gradient={num_workers}",
        f"batch_size={batch_size * num_workers}",
        f"steps={2 * PERIOD - 1}",
        *WITHOUT_EXTRAS,
        *extra,
    ]
    return load_spec(path, overrides=overrides)


def compute_alone(
    spec: JobSpec, data_dir: Path | None, start: Barrier, seconds: multiprocessing.Queue[float]
) -> None:
    """Compute some steps as a gradient worker does, in a separate process."""
    torch.set_num_threads(1)
    task = load_task(spec, ROOT / "examples", data_dir=data_dir)
    model = build_model(task, spec.seed, torch_dtype(spec.dtype))
    computer = BatchComputer(model, distribution=get_distribution(task.distribution), seed=0)
    inputs, targets = next(batches(spec, task.train_data()))

    def step() -> None:
        sums = computer.gradient(inputs, targets)
        computer.fisher_sums(inputs, [sums.gradient, sums.gradient], sums.trace)

    step()
    start.wait()
    started = time.perf_counter()
    for _ in range(ALONE_STEPS):
        step()
    seconds.put((time.perf_counter() - started) / ALONE_STEPS)


def seconds_alone(spec: JobSpec, data_dir: Path | None, num_processes: int) -> float:
    """Return the seconds of a step when `num_processes` compute at the same time."""
    context = multiprocessing.get_context("spawn")
    start, seconds = context.Barrier(num_processes, timeout=120), context.Queue()
    arguments = (spec, data_dir, start, seconds)
    processes = [
        context.Process(target=compute_alone, args=arguments) for _ in range(num_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes), "see its traceback above"
    return mean(seconds.get() for _ in processes)


class Measured:
    """The measurements with one number of workers, over all rounds."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.turns: list[Turns] = []
        self.alone: list[float] = []

    def run_round(self, alone_spec: JobSpec, data_dir: Path | None) -> None:
        """Run one period of the job, then the same work without exchange."""
        turns = Turns(first=PERIOD, steps_a_turn=PERIOD)
        run_turns(self.spec, data_dir, turns)
        self.turns.append(turns)
        self.alone.append(seconds_alone(alone_spec, data_dir, self.spec.workers.gradient))

    @property
    def seconds(self) -> float:
        """Wall seconds of a step."""
        return mean(turns.step_seconds for turns in self.turns)

    @property
    def alone_seconds(self) -> float:
        """Wall seconds of a step without exchange."""
        return mean(self.alone)

    def report(self, single: Measured, num_parameters: int) -> dict[str, Any]:
        """Return the result, compared with that of one worker, `single`."""
        records = [record for turns in self.turns for record in turns.records]
        vector_bytes = num_parameters * torch_dtype(self.spec.dtype).itemsize
        phases = [turns.phase_seconds() for turns in self.turns]
        usual = min(record.exchanged_bytes for record in records)
        return {
            "gradient_workers": self.spec.workers.gradient,
            "batch_size": self.spec.batch_size,
            "step_seconds": round(self.seconds, 4),
            "efficiency": round(single.seconds / self.seconds, 3),
            "ceiling": round(single.alone_seconds / self.alone_seconds, 3),
            "exchanged_bytes_a_step": round(mean(record.exchanged_bytes for record in records)),
            "messages_a_step": round(mean(record.num_messages for record in records), 1),
            "exchanged_over_parameters": {
                "mean": round(mean(r.exchanged_bytes for r in records) / vector_bytes, 4),
                "without_search": round(usual / vector_bytes, 4),
            },
            "phase_seconds": {p: round(mean(s[p] for s in phases), 4) for p in phases[0]},
        }


def statistics_bytes(spec: JobSpec, registration: Registration) -> int:
    """Return the bytes of factors that a worker sends in a step with statistics."""
    elements = sum(packed_size(order) for block in registration.blocks for order in block.orders)
    return elements * torch_dtype(spec.dtype).itemsize


def markdown(result: dict[str, Any]) -> str:
    runs = result["runs"]
    rows = [
        [
            run["gradient_workers"],
            run["batch_size"],
            run["step_seconds"],
            f"**{run['efficiency']}**",
            run["ceiling"],
            f"{run['exchanged_over_parameters']['mean']} P",
            f"{run['exchanged_over_parameters']['without_search']} P",
            run["messages_a_step"],
        ]
        for run in runs
    ]
    header = [
        "gradient workers",
        "batch",
        "step, s",
        "efficiency",
        "ceiling",
        "floats a worker and step",
        "without search",
        "messages a step",
    ]
    names = [f"{run['gradient_workers']} workers" for run in runs]
    phases = [
        [phase, *(run["phase_seconds"][phase] for run in runs)]
        for phase in runs[0]["phase_seconds"]
    ]
    return document(
        "Weak scaling over gradient workers",
        "`python benchmarks/scaling.py --data-dir DIR --out benchmarks/results`: "
        f"{result['job']}, {result['batch_size']} cases a worker, one thread a worker, one "
        f"asynchronous inverse worker, float32, torch {result['versions']['torch']}, Ray "
        f"{result['versions']['ray']}, {result['hardware']['cores']} cores, {result['rounds']} "
        f"rounds of {PERIOD} steps. P is {result['num_parameters']}. Ceiling: the efficiency of "
        "the same number of processes that compute without exchanging anything, on the same cores "
        "in the same run.",
        table(header, rows),
        "Bytes are counted where they are passed to the process group: one vector of gradients "
        "up, and one of directions down, or three in a step that decides a search for gamma (one "
        f"in {PERIOD}). Factors go to the inverse workers through the object store: "
        f"{result['statistics_bytes'] / 1e6:.1f} MB a worker and step.",
        table(["phase, s", *names], phases),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output_options(parser)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, help="cases for each worker")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="an override, as in the CLI")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = ROOT / f"examples/{'mnist_5k' if arguments.short else 'mnist_autoencoder'}.yaml"
    size = arguments.batch_size or (100 if arguments.short else 1000)
    rounds = 1 if arguments.short else arguments.rounds
    spec = job(path, 1, size, arguments.set)
    assert isinstance(spec.optimizer, KFACSpec)
    task = load_task(spec, ROOT / "examples", data_dir=arguments.data_dir)
    registration = register(build_model(task, spec.seed, torch_dtype(spec.dtype)), spec.optimizer)
    started = surroundings()
    measured = [Measured(job(path, count, size, arguments.set)) for count in arguments.workers]
    with ray_cluster(None):
        for _ in range(rounds):
            for measurement in measured:
                measurement.run_round(spec, arguments.data_dir)
                workers = measurement.spec.workers.gradient
                print(workers, measurement.seconds, measurement.alone_seconds, file=sys.stderr)
    result = {
        "question": "step of one gradient worker over the step of several, same batch a worker",
        **conditions(spec),
        **started,
        "seed": spec.seed,
        "rounds": rounds,
        "num_parameters": registration.num_parameters,
        "statistics_bytes": statistics_bytes(spec, registration),
        "runs": [each.report(measured[0], registration.num_parameters) for each in measured],
    }
    deliver("scaling", result, markdown(result), arguments.out)


if __name__ == "__main__":
    main()
