"""Arrays that are decoded once a machine and then mapped, so that no process holds them whole.

What a file format cannot be mapped as (gzip, records, text) is written to the cache as `.npy`
files. Processes that map them share one copy in the page cache, of which each reads only the rows
that it needs, and which the system may drop when memory is short.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]

_UNFINISHED = ".writing-"
_FORMAT = 1  # raised when decoding changes, so that arrays of older versions are not used
_UNUSED_SECONDS = 7 * 24 * 3600.0  # then the arrays of a source that has changed since may go


def decoded_arrays(
    cache_dir: Path, sources: Sequence[Path], what: str, decode: Callable[[], Arrays]
) -> Arrays:
    """Return the arrays that `decode` makes of the files `sources`, mapped from the cache.

    They are writable without changing the files. Only the first process calls `decode`, while the
    others wait for it. The arrays are made again when path, size or times of a source have changed.
    Where the cache cannot be written, `decode` is called and a warning says so.

    Args:
        cache_dir: the folder of the data cache.
        sources: the files that the arrays come from; they exist.
        what: says which arrays these are, among all that are made of the same files.
        decode: makes arrays that are not empty.
    """
    folder = cache_dir / "decoded"
    own = f"{sources[0].name}-{_digest(what, *(str(path.resolve()) for path in sources))}"
    target = folder / f"{own}-{_digest(*map(_state, sources))}"
    found = _open(target)
    if found is not None:
        return found
    arrays: Arrays | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{own}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _open(target)  # another process may have decoded it meanwhile
            if found is None:
                _remove_unused(folder, own)
                arrays = decode()
                _write(target, arrays, folder / f"{_UNFINISHED}{own}")
    except OSError as error:
        warnings.warn(
            f"the data cache {folder} cannot be used ({error.strerror}), so each process decodes "
            "the data set for itself and holds all of it; give it a folder that can be written",
            stacklevel=2,
        )
        return decode() if arrays is None else arrays
    found = found or _open(target)
    assert found is not None, f"{target} was written and cannot be read"
    return found


def _digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def _state(source: Path) -> str:
    found = source.stat()
    # The time of the last change of the inode cannot be set back, unlike that of the content.
    return f"{_FORMAT} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _open(target: Path) -> Arrays | None:
    """Map the arrays in the folder `target`; None if it is not there, not whole or not readable."""
    try:
        paths = sorted(target.iterdir())
        arrays = {path.stem: np.load(path, mmap_mode="c", allow_pickle=False) for path in paths}
    except (OSError, ValueError):  # ValueError: a file is shorter than its header says
        return None
    with suppress(OSError):  # a cache that is only read keeps no account of its use
        os.utime(target)
    return arrays


def _write(target: Path, arrays: Arrays, temporary: Path) -> None:
    """Write all arrays or none: other processes see the folder when it is whole."""
    temporary.mkdir()
    try:
        for name, array in arrays.items():
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, np.ascontiguousarray(array), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)  # one that was not whole
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_unused(folder: Path, own: str) -> None:
    """Remove what was decoded from older contents of the same files, a week after its last use.

    What a process left that was killed while it wrote is removed at once: the caller has the lock.
    """
    shutil.rmtree(folder / f"{_UNFINISHED}{own}", ignore_errors=True)
    oldest = time.time() - _UNUSED_SECONDS
    for path in folder.glob(f"{own}-*"):
        if path.stat().st_mtime < oldest:
            shutil.rmtree(path, ignore_errors=True)
