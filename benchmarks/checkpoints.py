"""How long does training stand still for a checkpoint?

A state of 100 MB is written by the caller itself, as it was before, and in the thread beside it, in
turns. Copying the state out of the actors comes before both and is not counted.

    python benchmarks/checkpoints.py --out benchmarks/results
    python benchmarks/checkpoints.py --short
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from report import add_output_options, deliver, document, surroundings, table

from workers.checkpoint import write_checkpoint
from workers.driver.checkpoint_writer import CheckpointContent, CheckpointWriter

NUM_ARRAYS, ELEMENTS = 10, 1_250_000


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """Return the median seconds: of the write itself, and of the caller beside a thread."""
    random = np.random.default_rng(0)
    arrays = {f"array {n}": random.random(ELEMENTS) for n in range(NUM_ARRAYS)}
    roles = {"parameter_server": arrays}
    writer = CheckpointWriter(folder / "beside", 2, lambda step: None)
    itself, beside = [], []
    for step in range(1, repeats + 1):
        started = time.perf_counter()
        write_checkpoint(folder / "itself", step, roles, {}, keep=2)
        itself.append(time.perf_counter() - started)
        content = CheckpointContent(step=step, roles=lambda: roles, state={})
        started = time.perf_counter()
        writer.start(content)
        writer.look()
        beside.append(time.perf_counter() - started)
        writer.finish(lambda: None)
    return {"itself_seconds": median(itself), "beside_seconds": median(beside)}


def markdown(result: dict[str, Any]) -> str:
    """Return the page of the result."""
    rows = [
        ("written by the caller", f"{1e3 * result['itself_seconds']:.1f}"),
        ("written in a thread", f"{1e3 * result['beside_seconds']:.1f}"),
    ]
    return document(
        "How long training stands still for a checkpoint of 100 MB",
        table(("", "the caller waits, ms"), rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output_options(parser)
    arguments = parser.parse_args()
    started = surroundings()
    with tempfile.TemporaryDirectory() as name:
        measured = measure(Path(name), 2 if arguments.short else 7)
    result = {"question": "time a checkpoint of 100 MB holds training up", **started, **measured}
    deliver("checkpoints", result, markdown(result), arguments.out)


if __name__ == "__main__":
    main()
