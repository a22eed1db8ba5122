"""Does a gradient worker's memory grow with the data set, and what does reading ahead save?

In the first part a new process opens images of 28x28 bytes in a compressed npz file, reads 50
batches of 256 as a gradient worker does, and then all of them as an evaluation does. Reported is by
how much its private memory has grown, for one and for eight times the cases: for the data set
`npz`, and for a user's task that loads the same arrays, as every process did before.

In the second part each case takes a millisecond to read, and a step is the gradient of a net on the
64 cases of a batch. Numbers of data processes and of batches read ahead take turns.

    python benchmarks/data_reading.py --out benchmarks/results
    python benchmarks/data_reading.py --short
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from processes import private_bytes
from report import add_output_options, deliver, document, surroundings, table

from kfac_dist.config import JobSpec, parse_spec
from kfac_dist.coordination.steps.sampling import SamplerCursor, next_window
from kfac_dist.core.compute import BatchComputer
from kfac_dist.data import MapDataset, Split
from kfac_dist.tasks import build_model, distribution_of, load_task, torch_dtype
from workers.exchange.messages import JobContext
from workers.gradient_worker.batches import BatchReader
from workers.gradient_worker.data_processes import ProcessReader
from workers.gradient_worker.reading import CaseRange, CaseReader, PlainReader, ThreadReader

CASES = (30_000, 240_000)
SHORT_CASES = (3_000, 24_000)
BATCH = 256
NUM_BATCHES = 50
SLOW_BATCH = 64
ITEM_SECONDS = 0.001
CPU = torch.device("cpu")
MEBIBYTE = 2**20
SETTINGS = ((0, 0), (1, 0), (1, 2), (2, 2), (4, 2))  # data processes, batches read ahead

USER_TASKS = f"""
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Held:
    distribution = "categorical"

    def model(self):
        return nn.Linear(784, 10)

    def train_data(self, data_dir):
        with np.load(data_dir / "data.npz") as arrays:
            x, y = arrays["x_train"], arrays["y_train"]
        return TensorDataset(torch.from_numpy(x), torch.from_numpy(y))

    def test_data(self, data_dir):
        with np.load(data_dir / "data.npz") as arrays:
            return TensorDataset(torch.from_numpy(arrays["x_test"]), torch.zeros(9).long())


class Slow:
    distribution = "categorical"

    def model(self):
        return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(),
                             nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))

    def train_data(self, data_dir):
        return Items()

    def test_data(self, data_dir):
        return Items()


class Items:
    def __len__(self):
        return 4096

    def __getitem__(self, index):
        time.sleep({ITEM_SECONDS})
        return torch.full((784,), index / 4096), index % 10
"""


def spec_of(task: str, data: dict[str, Any], batch_size: int) -> JobSpec:
    values = {"name": "reading", "task": task, "steps": 1, "batch_size": batch_size}
    return parse_spec(values | {"data": data})


def context(spec: JobSpec, folder: Path) -> JobContext:
    return JobContext(
        job="reading",
        attempt=1,
        spec=spec,
        base_dir=folder,
        data_dir=folder,
        cache_dir=folder,
        run_dir=folder,
    )


def open_data(job: JobContext) -> dict[Split, MapDataset]:
    task = load_task(job.spec, job.base_dir, data_dir=job.data_dir, cache_dir=job.cache_dir)
    return {"train": task.train_data(), "test": task.test_data()}


def write_images(folder: Path, num_cases: int) -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (num_cases, 784), np.uint8)
    y = np.arange(num_cases) % 10
    np.savez_compressed(folder / "data.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])


def held_mib(kind: str, folder: Path) -> float:
    """Return by how much the private memory of this process grows; to be called in a new one."""
    if kind == "mapped":
        job = context(spec_of("classifier", {"name": "npz"}, BATCH), folder)
    else:
        job = context(spec_of("tasks.py:Held", {}, BATCH), folder)
    before = private_bytes(os.getpid())
    data = open_data(job)
    reader: CaseReader
    reader = ThreadReader(data, seed=0) if kind == "mapped" else PlainReader(data, seed=0)
    read_steps(BatchReader(reader, num_workers=1, rank=0, device=CPU, prefetch_batches=2), data)
    num_cases = len(data["train"])
    for start in range(0, num_cases, BATCH):
        stop = min(start + BATCH, num_cases)
        reader.read(CaseRange(split="train", epoch=None, start=start, stop=stop))
    gc.collect()
    after = private_bytes(os.getpid())
    reader.close()
    return (after - before) / MEBIBYTE


def read_steps(reader: BatchReader, data: dict[Split, MapDataset]) -> None:
    cursor = SamplerCursor(epoch=0, offset=0)
    for _ in range(min(NUM_BATCHES, len(data["train"]) // BATCH)):
        window, cursor = next_window(cursor, BATCH, len(data["train"]))
        reader.read(window)


def memory_rows(cases: Sequence[int]) -> list[dict[str, Any]]:
    spawn = multiprocessing.get_context("spawn")
    rows = []
    for num_cases in cases:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_images(folder, num_cases)
            (folder / "tasks.py").write_text(USER_TASKS)
            grown = {}
            for kind in ("mapped", "mapped", "held"):  # the first process decodes the file
                with spawn.Pool(1) as pool:
                    grown[kind] = round(pool.apply(held_mib, (kind, folder)), 1)
        rows.append(
            {
                "cases": num_cases,
                "data_mib": round(num_cases * 784 / MEBIBYTE, 1),
                "mapped_mib": grown["mapped"],
                "held_mib": grown["held"],
            }
        )
        print(rows[-1], file=sys.stderr)
    return rows


def slow_rows(folder: Path, num_steps: int) -> list[dict[str, Any]]:
    rows = []
    for num_workers, prefetch in SETTINGS:
        options = {"num_workers": num_workers, "prefetch_batches": prefetch}
        job = context(spec_of("tasks.py:Slow", options, SLOW_BATCH), folder)
        seconds, computing = time_steps(job, num_steps)
        rows.append(options | {"step_ms": seconds * 1e3, "gradient_ms": computing * 1e3})
        print(rows[-1], file=sys.stderr)
    first = rows[0]["step_ms"]
    return [
        row
        | {
            "step_ms": round(row["step_ms"], 1),
            "gradient_ms": round(row["gradient_ms"], 1),
            "over_no_processes": round(row["step_ms"] / first, 3),
        }
        for row in rows
    ]


def time_steps(job: JobContext, num_steps: int) -> tuple[float, float]:
    """Return the median seconds of a step, and of the gradient in it, after the first three."""
    task, data = load_task(job.spec, job.base_dir), open_data(job)
    model = build_model(task, 0, torch_dtype(job.spec.dtype))
    distribution = distribution_of(task)
    computer = BatchComputer(model, distribution=distribution, seed=0, registration=None)
    options, steps, computing = job.spec.data, [], []
    reader: CaseReader
    reader = ProcessReader(job, data, 0) if options.num_workers else PlainReader(data, seed=0)
    batches = BatchReader(
        reader,
        num_workers=1,
        rank=0,
        device=CPU,
        prefetch_batches=options.prefetch_batches,
    )
    cursor = SamplerCursor(epoch=0, offset=0)
    for _ in range(3 + num_steps):
        started = time.perf_counter()
        window, cursor = next_window(cursor, SLOW_BATCH, len(data["train"]))
        part = batches.read(window)
        read = time.perf_counter()
        computer.gradient(part.inputs, part.targets)
        ended = time.perf_counter()
        steps.append(ended - started)
        computing.append(ended - read)
    reader.close()
    return median(steps[3:]), median(computing[3:])


def markdown(result: dict[str, Any]) -> str:
    memory = [list(row.values()) for row in result["memory"]]
    slow = [list(row.values()) for row in result["slow_items"]]
    versions, hardware = result["versions"], result["hardware"]
    return document(
        "Reading data: memory by size of the data set, and slow items",
        "`python benchmarks/data_reading.py --out benchmarks/results`. "
        f"torch {versions['torch']}, {hardware['cores_used']} cores, load "
        f"{result['load_average'][0]} when it began.",
        "By how much the private (anonymous) memory of a process grows that opens the data set, "
        f"reads {NUM_BATCHES} batches of {BATCH} in shuffled order and then all cases: mapped from "
        "the cache, as built-in data sets are, and held by a task that loads the arrays.",
        table(("cases", "data, MiB", "mapped, MiB", "held, MiB"), memory),
        f"Steps on {SLOW_BATCH} cases that take {ITEM_SECONDS * 1e3:g} ms each to read; a step "
        "computes a gradient, in the same process. Medians.",
        table(
            (
                "`num_workers`",
                "`prefetch_batches`",
                "step, ms",
                "gradient, ms",
                "over `num_workers: 0`",
            ),
            slow,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = surroundings()
    memory = memory_rows(SHORT_CASES if arguments.short else CASES)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "tasks.py").write_text(USER_TASKS)
        slow = slow_rows(Path(name), 5 if arguments.short else 40)
    result = {
        "question": "private memory by size of the data set; step time with slow items",
        **started,
        "memory": memory,
        "slow_items": slow,
    }
    deliver("data_reading", result, markdown(result), arguments.out)


if __name__ == "__main__":
    main()
