"""`make test-gpu`: runs all checks on the GPU of this machine, in less than 10 minutes.

It ends with an error if one fails, and writes what it measured to benchmarks/results/gpu.md.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from tests.gpu.checks import Table, inversions, parity, phases, poisoned_copies, reads
from tests.gpu.lost_member import killed_member
from tests.gpu.test_host_reads import READS_A_STEP
from tests.paths import ROOT

RESULTS = ROOT / "benchmarks/results/gpu.md"
NO_GPU = "make test-gpu: torch finds no GPU on this machine, and nothing was checked"


def tables(device: torch.device) -> list[Table]:
    """Run all checks on `device`; an AssertionError says which one failed."""
    checks: list[Callable[[], Table]] = [
        lambda: parity(device),
        lambda: reads(device, READS_A_STEP),
        lambda: poisoned_copies(device),
        lambda: killed_member("gloo", num_workers=2, timeout_seconds=20),
        lambda: phases(device),
        lambda: inversions(device),
    ]
    if torch.cuda.device_count() >= 2:
        most = min(torch.cuda.device_count(), 4) - 1
        checks.append(lambda: killed_member("nccl", num_workers=most, timeout_seconds=20))
    found = []
    for check in checks:
        started = time.monotonic()
        found.append(check())
        print(f"{found[-1].title}: {time.monotonic() - started:.1f} s", flush=True)
    return found


def write_results(found: Sequence[Table], device_name: str, path: Path) -> None:
    """Write the tables as Markdown."""
    day = datetime.now(UTC).date()
    lines = [
        "# On a GPU",
        f"`make test-gpu` on {device_name} ({torch.cuda.device_count()} visible), "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, {day}.",
    ]
    for table in found:
        lines += ["", f"## {table.title}"]
        lines += [_row(table.columns), _row(["---"] * len(table.columns))]
        lines += map(_row, table.rows)
    path.write_text("\n".join(lines) + "\n")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Run the checks; return the exit code."""
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    if torch.cuda.device_count() < 2:
        print("A killed member, nccl: not checked, it needs two GPUs", flush=True)
    write_results(tables(device), torch.cuda.get_device_name(device), RESULTS)
    print(f"all passed; {RESULTS.relative_to(ROOT)} has the figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
