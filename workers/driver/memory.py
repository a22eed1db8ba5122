"""The memory of this process and of the machine, as Linux counts it; bytes."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_RESET = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Return what this process holds in memory now."""
    return _read(_STATUS, "VmRSS")


def mapped_bytes() -> int:
    """Return the part of `resident_bytes` that belongs to files, which processes share."""
    return _read(_STATUS, "RssFile")


def peak_bytes() -> int:
    """Return the most that this process has held since its start, or since `reset_peak`."""
    return _read(_STATUS, "VmHWM")


def reset_peak() -> None:
    """Let `peak_bytes` begin again with what is held now, where the system permits it.

    A sandbox may not. The peak is then that of the whole process, which is rather too much.
    """
    with contextlib.suppress(PermissionError):
        _RESET.write_text("5")


def available_bytes() -> int:
    """Return how much memory the machine can still give to processes without swapping."""
    return _read(_MEMINFO, "MemAvailable")


def _read(path: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", path.read_text(), re.MULTILINE)
    assert found is not None, f"{path} has no {name}"
    return int(found[1]) * 1024
