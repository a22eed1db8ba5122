"""The home: made and closed to other users, or refused with a message."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kfac_dist.cli.environment import data_folder, data_place, only_this_user, ready_home
from kfac_dist.errors import UsageError
from tests.cli.conftest import KfacDist


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_home_is_closed_to_others(home: Path) -> None:
    said: list[str] = []
    assert ready_home(said.append) == home
    assert (mode(home), said) == (0o700, [])


def test_an_open_home_is_closed_with_a_message(home: Path) -> None:
    (home / "runs").mkdir(parents=True)
    (home / "store.db-wal").touch()
    home.chmod(0o755)
    (home / "runs").chmod(0o755)
    said: list[str] = []
    ready_home(said.append)
    assert (mode(home), mode(home / "runs")) == (0o700, 0o700)
    assert said == [f"other users could read {home}, {home}/runs: closed to them (mode 0700)"]
    ready_home(said.append)
    assert len(said) == 1


def test_a_folder_with_other_things_keeps_its_mode_and_its_parts_are_closed(home: Path) -> None:
    (home / "runs").mkdir(parents=True)
    (home / "holiday.jpg").touch()
    home.chmod(0o755)
    (home / "runs").chmod(0o750)
    said: list[str] = []
    ready_home(said.append)
    assert (mode(home), mode(home / "runs")) == (0o755, 0o700)
    assert said == [f"other users could read {home}/runs: closed to them (mode 0700)"]


def test_what_is_made_inside_is_closed(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with only_this_user():
            (tmp_path / "folder").mkdir()
            (tmp_path / "file").touch()
        (tmp_path / "later").touch()
    finally:
        os.umask(before)
    modes = [mode(tmp_path / name) for name in ("folder", "file", "later")]
    assert modes == [0o700, 0o600, 0o644]


@pytest.mark.parametrize("place", ["file/home", "/proc/none", "/proc/self", "/sys/none"])
@pytest.mark.parametrize("command", [["token", "list"], ["serve"]])
def test_a_home_that_cannot_be_written_is_exit_code_2(
    kfac_dist: KfacDist,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    command: list[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KFAC_DIST_HOME", str(tmp_path / place))
    done = kfac_dist(*command)
    assert (done.code, done.out) == (2, "")
    assert "cannot be written" in done.err
    assert "$KFAC_DIST_HOME" in done.err


def test_the_message_names_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFAC_DIST_HOME", "/proc/none")
    with pytest.raises(UsageError, match="the home /proc/none cannot be written"):
        ready_home(lambda _text: None)


def test_data_may_be_a_folder_or_a_url(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/x.npz").write_bytes(b"numbers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KFAC_DIST_DATA", raising=False)
    assert (data_place(None), data_folder(None)) == (None, None)
    assert data_place("sets") == data_folder("sets") == tmp_path / "sets"
    monkeypatch.setenv("KFAC_DIST_DATA", f"file://{tmp_path}/sets")
    assert data_place(None) == f"file://{tmp_path}/sets"
    fetched = data_folder(None)
    assert fetched is not None
    assert fetched.is_relative_to(home / "data/fetched")
    assert (fetched / "x.npz").read_bytes() == b"numbers"
