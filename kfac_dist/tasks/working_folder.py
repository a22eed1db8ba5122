"""The folder in which the user's code runs: that of the specification, on every path to a job."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    """Make `folder` the working folder of this process inside the block, if it exists.

    So `open("words.txt")` in a task finds the file beside the specification, whether `train` or a
    server runs the job, and from wherever it was started.
    """
    if not folder.is_dir():
        yield
        return
    with contextlib.chdir(folder):
        yield


def enter_working_folder(base_dir: Path, otherwise: Path) -> None:
    """Make `base_dir` the working folder of this process for good; `otherwise` if it is missing."""
    os.chdir(base_dir if base_dir.is_dir() else otherwise)
