"""Turn an exception of the user's code into a message with the user's line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kfac_dist.errors import KfacDistError, UserTaskError

# The cause may be another line than the user's: kernels run later than they are started, and
# others use the memory, too.
_GPU_ERRORS = (torch.AcceleratorError, torch.OutOfMemoryError)


@dataclass(frozen=True, kw_only=True)
class UserFiles:
    """Which files are the user's: those directly in `folder`, or, of a package, all below it.

    Paths below `base_dir` are shown relative to it. `label` is the task's name in the job
    specification.
    """

    label: str
    folder: Path
    is_package: bool
    base_dir: Path

    def location(self, error: BaseException) -> str | None:
        """Return `file:line` of the innermost frame in the user's files; None without one."""
        if isinstance(error, SyntaxError) and error.filename and self._owns(error.filename):
            return self._show(error.filename, error.lineno)
        found = None
        for frame, line in traceback.walk_tb(error.__traceback__):
            if self._owns(frame.f_code.co_filename):
                found = self._show(frame.f_code.co_filename, line)
        return found

    def _owns(self, filename: str) -> bool:
        path = Path(filename)
        return self.folder in path.parents if self.is_package else path.parent == self.folder

    def _show(self, filename: str, line: int | None) -> str:
        path = Path(filename)
        shown = path.relative_to(self.base_dir) if path.is_relative_to(self.base_dir) else path
        return f"{shown}:{line}"


@contextmanager
def blame_user(files: UserFiles, doing: str, *, always: bool) -> Iterator[None]:
    """Turn an exception in the block into a UserTaskError that names task, `doing` and place.

    The project's own errors pass unchanged. So do exceptions that did not pass through the user's
    files, and those of a GPU, unless `always` is set.
    """
    try:
        yield
    except KfacDistError:
        raise
    except (Exception, SystemExit) as error:
        place = files.location(error)
        if not always and (place is None or isinstance(error, _GPU_ERRORS)):
            raise
        raise UserTaskError(f"task {files.label}: {describe(doing, error, place)}") from error


def describe(doing: str, error: BaseException, place: str | None) -> str:
    """Return a message: what was done, the exception's type and text, and `place` if known."""
    # The text of a SyntaxError repeats the place, in another form.
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{doing} raised {type(error).__name__}: {text}" + (f" ({place})" if place else "")
