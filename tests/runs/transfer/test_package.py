"""User code as a package: files survive the round trip, and no entry leads out of the package."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from pathlib import Path

import pytest

from kfac_dist.errors import InvalidSpecError
from kfac_dist.runs.transfer import package
from kfac_dist.runs.transfer.package import check_package, pack, unpack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "code"
    (path / "pkg").mkdir(parents=True)
    (path / "task.py").write_text("x = 1\n")
    (path / "pkg/__init__.py").write_text("")
    (path / "pkg/data.bin").write_bytes(bytes(range(256)))
    return path


def zipped(*entries: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries:
            # Without the time of day, so that the ids of tests are the same in every process.
            archive.writestr(zipfile.ZipInfo(name) if isinstance(name, str) else name, content)
    return buffer.getvalue()


def entry(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def test_what_is_packed_is_unpacked(folder: Path, tmp_path: Path) -> None:
    for hidden in (".git", "__pycache__", ".venv"):
        (folder / hidden).mkdir()
        (folder / hidden / "file").write_text("no")
    (folder / ".env").write_text("SECRET=1")
    (folder / "link.py").symlink_to("/etc/passwd")
    data = pack(folder)
    check_package(data)
    unpack(data, tmp_path / "out")
    got = {
        str(path.relative_to(tmp_path / "out")): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert got == {
        "task.py": b"x = 1\n",
        "pkg/__init__.py": b"",
        "pkg/data.bin": bytes(range(256)),
    }
    assert pack(folder) == data


def test_an_executable_file_stays_one(folder: Path, tmp_path: Path) -> None:
    (folder / "tool").write_text("#!/bin/sh\n")
    (folder / "tool").chmod(0o755)
    unpack(pack(folder), tmp_path / "out")
    assert os.access(tmp_path / "out/tool", os.X_OK)
    assert not os.access(tmp_path / "out/task.py", os.X_OK)


def test_a_package_of_the_same_files_is_the_same(folder: Path) -> None:
    before = pack(folder)
    (folder / "task.py").touch()
    assert pack(folder) == before


def test_too_large_a_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_UNPACKED_BYTES", 100)
    with pytest.raises(InvalidSpecError, match="--data-dir"):
        pack(folder)


def test_too_many_files_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_FILES", 2)
    with pytest.raises(InvalidSpecError, match="more than 2 files"):
        pack(folder)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"no zip", "not a zip"),
        (b"", "not a zip"),
        (zipped(("../out.py", b"")), "leads out"),
        (zipped(("a/../../out.py", b"")), "leads out"),
        (zipped(("/etc/cron.d/x", b"")), "leads out"),
        (zipped(("a\\..\\b", b"")), "leads out"),
        (zipped((entry("link", stat.S_IFLNK | 0o777), b"/etc/passwd")), "link or a device"),
        (zipped((entry("pipe", stat.S_IFIFO | 0o600), b"")), "link or a device"),
        (zipped(("a", b""), ("a/b", b"")), "occurs twice, or both as a file and a folder"),
        (zipped(("a/b", b""), ("a", b"")), "occurs twice, or both as a file and a folder"),
    ],
)
def test_a_hostile_package_is_refused_and_writes_nothing(
    data: bytes, says: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSpecError, match=says):
        check_package(data)
    with pytest.raises(InvalidSpecError, match=says):
        unpack(data, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_bomb_is_refused_by_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(2_000_000))
    monkeypatch.setattr(package, "MAX_UNPACKED_BYTES", 1_000_000)
    with pytest.raises(InvalidSpecError, match="unpacked it has"):
        check_package(buffer.getvalue())


def test_a_file_that_is_larger_than_its_index_says_is_refused(tmp_path: Path) -> None:
    data = bytearray(zipped(("zeros", bytes(1000))))
    central = data.rindex(b"PK\x01\x02")
    data[central + 24 : central + 28] = (10).to_bytes(4, "little")  # its size in the index
    with pytest.raises(InvalidSpecError, match=r"damaged|larger"):
        unpack(bytes(data), tmp_path / "out")
