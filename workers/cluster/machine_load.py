"""How busy this machine is, as a phrase for messages: the usual reason why Ray does not start."""

from __future__ import annotations

import os
import re
from pathlib import Path

_MEMORY = Path("/proc/meminfo")
_AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB", re.MULTILINE)
_SHARED = "/dev/shm"  # Ray's object store
_GIB = 2**30


def describe_load() -> str:
    """Return the load and the free memory of this machine, with a hint if it is crowded."""
    load = os.getloadavg()[0]
    num_cpus = len(os.sched_getaffinity(0))
    shared = os.statvfs(_SHARED)
    phrases = [
        f"this machine has a load of {load:.1f} on {num_cpus} CPUs",
        f"{_available_bytes() / _GIB:.1f} GiB of memory free",
        f"{shared.f_bavail * shared.f_frsize / _GIB:.1f} GiB free in {_SHARED}",
    ]
    hint = "; try again when it is less busy" if load > num_cpus else ""
    return f"{', '.join(phrases)}{hint}"


def _available_bytes() -> int:
    found = _AVAILABLE.search(_MEMORY.read_text())
    return int(found[1]) * 1024 if found else 0
