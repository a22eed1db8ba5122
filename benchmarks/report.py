"""The output of the benchmarks: a JSON object with what is needed to repeat it, and a table."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def surroundings(packages: Sequence[str] = ("torch", "numpy", "ray")) -> dict[str, Any]:
    """Return versions of Python and `packages`, the hardware, and the load of the machine."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "hardware": {
            "machine": platform.machine(),
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "cores_used": len(os.sched_getaffinity(0)),
        },
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor()


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every benchmark that uses `deliver`."""
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--short", action="store_true", help="run a small job: seconds to minutes")
    parser.add_argument("--out", type=Path, help="write NAME.json and NAME.md into this folder")


def deliver(name: str, result: Mapping[str, Any], markdown: str, folder: Path | None) -> None:
    """Print the result as one JSON object, and write it with its table if a folder is given."""
    text = json.dumps(result)
    print(text)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(text + "\n")
        (folder / f"{name}.md").write_text(markdown)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; round floats before, they are written as they are."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def document(title: str, *paragraphs: str) -> str:
    """Return a Markdown document."""
    return "\n\n".join([f"# {title}", *paragraphs]) + "\n"
