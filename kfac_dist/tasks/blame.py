"""Turn what the user's code raises into one message: the exception, and the user's line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kfac_dist.errors import KfacDistError, UserTaskError


@dataclass(frozen=True, kw_only=True)
class UserFiles:
    """Which files are the user's: those right in `folder`, or all below it for a package.

    Paths are shown relative to `base_dir` where that is shorter. `label` is the task's name in
    the job specification.
    """

    label: str
    folder: Path
    is_package: bool
    base_dir: Path

    def location(self, error: BaseException) -> str | None:
        """`file:line` of the innermost frame in the user's files, None when there is none."""
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
    """Raise UserTaskError for what is raised inside, naming the task, `doing` and the place.

    The project's own errors pass through. So does, unless `always`, an error that did not come
    through the user's files.
    """
    try:
        yield
    except KfacDistError:
        raise
    except (Exception, SystemExit) as error:
        place = files.location(error)
        if place is None and not always:
            raise
        raise UserTaskError(f"task {files.label}: {describe(doing, error, place)}") from error


def describe(doing: str, error: BaseException, place: str | None) -> str:
    """What was being done, the exception's type and text, and the user's `file:line` if known."""
    # A SyntaxError's own text repeats its place in another form.
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{doing} raised {type(error).__name__}: {text}" + (f" ({place})" if place else "")
