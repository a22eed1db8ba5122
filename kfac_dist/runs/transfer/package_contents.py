"""Which files of a folder go into a package, and why the others do not."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pathspec import GitIgnoreSpec

from kfac_dist.errors import InvalidSpecError

IGNORE_FILE = ".kfacdistignore"

Kind = Literal["cache", "hidden", "ignored", "link", "name", "special"]
"""Why a file is left out; `cache` and `ignored` are what everybody expects."""

# What no job needs and what makes packages large. The lines of the ignore file come after these,
# and the last line that matches counts, so that `!.streamlit/` brings a hidden folder back.
_CACHES = ("__pycache__/", ".git/", ".venv/", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/")
_DEFAULTS = (".*", "node_modules/", "runs/", "venv/", *_CACHES, IGNORE_FILE)
_EXPECTED: tuple[Kind, ...] = ("cache", "ignored")
_IN_WORDS = {
    "hidden": "hidden or left out by default",
    "link": "links",
    "name": "with a name that packages cannot have",
    "special": "not plain files",
}


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """A file that goes into the package; `name` is relative to the folder, with slashes."""

    name: str
    num_bytes: int
    is_executable: bool


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A file, or a folder with `num_files` files, that stays where it is.

    The name of a folder ends with a slash. Links are not followed, so theirs is 0 bytes.
    """

    name: str
    kind: Kind
    why: str
    num_files: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a package of a folder has, and what it has not, each sorted by name within a folder."""

    packed: tuple[PackedFile, ...]
    left_out: tuple[LeftOut, ...]

    def surprises(self) -> str | None:
        """Return what is left out though nobody asked for it, in one sentence, else None.

        Caches are expected, and so is what the ignore file names.
        """
        counts = Counter(entry.kind for entry in self.left_out if entry.kind not in _EXPECTED)
        if not counts:
            return None
        parts = ", ".join(f"{count} {_IN_WORDS[kind]}" for kind, count in counts.items())
        first = next(entry for entry in self.left_out if entry.kind not in _EXPECTED)
        return (
            f"not sent: {parts}, such as {first.name!r}; "
            f"submit --dry-run lists them, and a line like !NAME in {IGNORE_FILE} sends a hidden "
            "one"
        )


def contents_of(folder: Path) -> Contents:
    """Return which files below `folder` a package has.

    Only the ignore file of `folder` itself counts, not those of its subfolders.

    Raises:
        InvalidSpecError: the ignore file is wrong, or a folder cannot be read.
    """
    rules = _Rules(folder)
    packed: list[PackedFile] = []
    left_out: list[LeftOut] = []
    for root, folders, files in os.walk(folder, onerror=_raise):  # does not follow links
        folders.sort()
        for name in list(folders):
            path = Path(root, name)
            if entry := rules.left_out(path, is_folder=True):
                folders.remove(name)
                left_out.append(entry)
        for name in sorted(files):
            path = Path(root, name)
            if entry := rules.left_out(path, is_folder=False):
                left_out.append(entry)
            else:
                packed.append(_packed(path, folder))
    return Contents(packed=tuple(packed), left_out=tuple(left_out))


class _Rules:
    """The built-in patterns, followed by those of the folder's ignore file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines = [*_DEFAULTS, *_lines_of(folder / IGNORE_FILE)]
        self._patterns = GitIgnoreSpec.from_lines(self._lines)

    def left_out(self, path: Path, *, is_folder: bool) -> LeftOut | None:
        """Return the reason to leave a file or folder out, None if it is packed."""
        name = path.relative_to(self._folder).as_posix()
        if path.is_symlink():
            return _entry(name, "link", f"a link to {os.readlink(path)}", [])  # noqa: PTH115
        shown = f"{name}/" if is_folder else name
        found = self._patterns.check_file(shown)
        if found.include and found.index is not None:
            kind, why = self._reason(found.index)
            return _entry(shown, kind, why, _files_below(path) if is_folder else [path])
        if not name.isprintable() or "\\" in name:
            why = "its name has a backslash or a character that cannot be printed"
            return _entry(shown, "name", why, _files_below(path) if is_folder else [path])
        if not is_folder and not stat.S_ISREG(path.lstat().st_mode):
            return _entry(shown, "special", "not a plain file", [])
        return None

    def _reason(self, index: int) -> tuple[Kind, str]:
        line = self._lines[index]
        if index >= len(_DEFAULTS):
            return "ignored", f"line {index - len(_DEFAULTS) + 1} of {IGNORE_FILE}: {line}"
        if line == IGNORE_FILE:
            return "ignored", "the ignore file itself"
        if line in _CACHES:
            return "cache", "a folder that no job needs"
        return "hidden", "hidden" if line == ".*" else f"{line} is left out by default"


def _lines_of(path: Path) -> list[str]:
    """Return the lines of an ignore file, after checking each; nothing if it does not exist."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSpecError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            GitIgnoreSpec.from_lines([line])
        except ValueError as error:
            raise InvalidSpecError(
                f"{path}, line {number}: {line!r} is not a pattern of gitignore"
            ) from error
    return lines


def _packed(path: Path, folder: Path) -> PackedFile:
    status = path.stat()
    return PackedFile(
        name=path.relative_to(folder).as_posix(),
        num_bytes=status.st_size,
        is_executable=bool(status.st_mode & stat.S_IXUSR),
    )


def _entry(name: str, kind: Kind, why: str, files: Iterable[Path]) -> LeftOut:
    sizes = [path.lstat().st_size for path in files]
    num_files = len(sizes) if name.endswith("/") else 1
    return LeftOut(
        name=_printable(name),
        kind=kind,
        why=_printable(why),
        num_files=num_files,
        num_bytes=sum(sizes),
    )


def _printable(text: str) -> str:
    """Escape characters that would move a terminal's cursor or that UTF-8 has not."""
    return text if text.isprintable() else ascii(text)[1:-1]


def _files_below(folder: Path) -> Iterator[Path]:
    for root, _, files in os.walk(folder):  # a folder that cannot be read counts as empty
        yield from (Path(root, name) for name in files)


def _raise(error: OSError) -> None:
    raise InvalidSpecError(
        f"{error.filename}: this folder would be sent with the job and cannot be read: "
        f"{error.strerror}; leave it out with a line in {IGNORE_FILE}"
    ) from error
