"""The benchmarks on real workers: short runs from the command line, and what they count."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT

SMALL = ("data.limit=200", "task_args.hidden=[20,5]")


def result_of(name: str, folder: Path, *arguments: str) -> Any:
    script = str(ROOT / f"benchmarks/{name}.py")
    done = subprocess.run(
        [sys.executable, script, "--short", "--out", str(folder), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / f"{name}.md").read_text().startswith("# ")
    result = json.loads((folder / f"{name}.json").read_text())
    assert result == json.loads(done.stdout)
    assert {"versions", "hardware", "load_average", "seed"} <= result.keys()
    return result


def changed(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def test_a_distributed_step_next_to_a_serial_one(tmp_path: Path) -> None:
    arguments = ["--layout", "one core", *changed(*SMALL, "batch_size=20")]
    result = result_of("distributed_cost", tmp_path, *arguments)
    (run,) = result["layouts"].values()
    assert run["steps"] == 20
    assert run["distributed_seconds"] > 0
    roles = run["distributed_cpu_over_serial_step"]
    assert {"driver", "gradient_worker", "inverse_worker", "parameter_server"} <= roles.keys()
    assert (
        run["serial_phases_over_step"].keys() <= run["distributed_phases_over_serial_step"].keys()
    )


def test_weak_scaling_counts_what_is_sent(tmp_path: Path) -> None:
    arguments = ["--batch-size", "20", "--workers", "1", *changed(*SMALL)]
    (run,) = result_of("scaling", tmp_path, *arguments)["runs"]
    assert run["efficiency"] == run["ceiling"] == 1
    # Two vectors, and the numbers beside them, which are many for so small a net.
    assert 2 < run["exchanged_over_parameters"]["without_search"] < 2.05
    assert run["exchanged_over_parameters"]["mean"] > 2.05


def test_a_refresh_is_split_into_inverted_and_moved(tmp_path: Path) -> None:
    result = result_of("inversion", tmp_path)
    rows = result["refreshes"]
    assert [(row["order"], row["inverse_workers"]) for row in rows] == [
        (64, 1),
        (64, 2),
        (128, 1),
        (128, 2),
    ]
    for row in rows:
        assert 0 < row["inverted_ms"] < row["refresh_ms"]
        assert 0 < row["moved_share"] < 1


@pytest.mark.timeout(600)
def test_memory_of_every_role(tmp_path: Path) -> None:
    result = result_of("memory", tmp_path)
    assert set(result["roles"]) == {"gradient_worker", "inverse_worker", "parameter_server"}
    first, last = result["limits"]
    assert first["factor_elements"] == last["factor_elements"]
    assert first["cases"] < last["cases"]
