"""Settings from the environment: the home folder, the data sets, Ray's address."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kfac_dist._home import DEFAULT_HOME, data_cache
from kfac_dist.config.urls import is_url
from kfac_dist.errors import UsageError

_PRIVATE = 0o700
# What a home consists of; a folder with anything else is also used for other things.
_PARTS = ("runs", "packages", "ray", "crashes", "data")
_FILES = ("store.db", "server.json", "server.log", "local.token", ".lock", ".server.json.tmp")


def home() -> Path:
    """Return `$KFAC_DIST_HOME`, else the user's default home."""
    return absolute(Path(os.environ.get("KFAC_DIST_HOME") or DEFAULT_HOME))


@contextmanager
def only_this_user() -> Iterator[None]:
    """Close what is made inside the block, also by processes that it starts, to other users."""
    before = os.umask(0o777 & ~_PRIVATE)
    try:
        yield
    finally:
        os.umask(before)


def ready_home(say: Callable[[str], None]) -> Path:
    """Return the home, after making sure that it can be written and that only its user reads it.

    `say` receives what had to be changed. A folder that is also used for other things, or that
    belongs to another user, keeps its mode; then only its parts are closed.

    Raises:
        UsageError: the home cannot be made or written.
    """
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=_PRIVATE)
        tempfile.TemporaryFile(dir=folder).close()
        closed = [str(path) for path in _open_parts(folder)]
    except OSError as error:
        raise UsageError(
            f"the home {folder} cannot be written ({error.strerror}); set $KFAC_DIST_HOME to a "
            "folder that can"
        ) from error
    if closed:
        say(f"other users could read {', '.join(closed)}: closed to them (mode 0700)")
    return folder


def _open_parts(folder: Path) -> Iterator[Path]:
    """Close the home and its parts to other users, and yield what was open to them."""
    parts = [path for name in _PARTS if (path := folder / name).is_dir()]
    for path in [folder, *parts] if _is_only_a_home(folder) else parts:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077 and path.stat().st_uid == os.getuid():
            path.chmod(mode & _PRIVATE)
            yield path


def _is_only_a_home(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return all(name in _PARTS or name.startswith(_FILES) for name in names)


def data_place(option: str | None) -> Path | str | None:
    """Return the value of `--data-dir`, else `$KFAC_DIST_DATA`, else None; a URL is a string."""
    given = option or os.environ.get("KFAC_DIST_DATA")
    if not given:
        return None
    return given if is_url(given) else absolute(Path(given))


def data_folder(option: str | None) -> Path | None:
    """Return the folder of data sets on this machine; one behind a URL is fetched into the cache.

    Raises:
        KfacDistError: it cannot be fetched.
    """
    from kfac_dist.runs.transfer.fetch import local_folder

    return local_folder(data_place(option), data_cache(home()))


def ray_address() -> str | None:
    """Return `$RAY_ADDRESS`, which Ray sets for the jobs that it runs."""
    return os.environ.get("RAY_ADDRESS")


def absolute(path: Path) -> Path:
    """Make a path absolute, since workers have another working folder. Links are kept."""
    return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100 - resolve() follows links
