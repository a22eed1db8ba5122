"""Data sets behind a URL are fetched once, verified, and read from a folder of this machine."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kfac_dist.errors import DataNotFoundError, UnreachableError
from kfac_dist.runs.transfer.fetch import fetch_folder, fetched_folder, local_folder
from kfac_dist.runs.transfer.remote import RemoteFolder
from tests.runs.transfer.local_s3 import s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as url:
        yield url


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteFolder:
    url = f"file://{tmp_path}" if request.param == "file" else request.getfixturevalue("s3")
    folder = RemoteFolder(f"{url}/{secrets.token_hex(4)}/digits")
    write(folder, tmp_path, "train/images.npz", b"images")
    write(folder, tmp_path, "labels.npz", b"labels")
    return folder


def write(folder: RemoteFolder, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "source").write_bytes(content)
    folder.put(tmp_path / "source", name)


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    get, names = RemoteFolder.get, []

    def count(self: RemoteFolder, name: str, target: Path) -> None:
        names.append(name)
        get(self, name, target)

    monkeypatch.setattr(RemoteFolder, "get", count)
    return names


def test_all_processes_get_one_copy_and_a_changed_file_is_fetched_again(
    place: RemoteFolder, tmp_path: Path, fetches: list[str]
) -> None:
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: fetch_folder(place.url, cache), range(4)))
    assert found == {fetched_folder(place.url, cache)}
    (folder,) = found
    assert folder.name.startswith("digits-")
    assert (folder / "train/images.npz").read_bytes() == b"images"
    assert sorted(fetches) == ["labels.npz", "train/images.npz"]
    write(place, tmp_path, "labels.npz", b"better labels")
    assert (fetch_folder(f"{place.url}/", cache) / "labels.npz").read_bytes() == b"better labels"
    assert len(fetches) == 4
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"cut", "labels.npz arrived with 3 bytes, and the storage has 6"),
        (b"lobels", "labels.npz arrived with the MD5 "),
    ],
)
def test_a_damaged_file_is_refused_and_nothing_is_kept(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bytes, message: str
) -> None:
    place = RemoteFolder(f"{s3}/{secrets.token_hex(4)}")
    write(place, tmp_path, "labels.npz", b"labels")
    monkeypatch.setattr(RemoteFolder, "get", lambda self, name, target: target.write_bytes(written))
    with pytest.raises(DataNotFoundError, match=message):
        fetch_folder(place.url, tmp_path / "cache")
    assert not fetched_folder(place.url, tmp_path / "cache").exists()


def test_what_was_fetched_serves_while_the_storage_is_away(
    place: RemoteFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(self: RemoteFolder) -> None:
        raise UnreachableError("no route")

    folder = fetch_folder(place.url, tmp_path / "cache")
    monkeypatch.setattr(RemoteFolder, "files", refuse)
    assert fetch_folder(place.url, tmp_path / "cache") == folder
    assert f"no route; what was fetched before is used: {folder}" in caplog.text
    with pytest.raises(UnreachableError):
        fetch_folder(place.url, tmp_path / "another")


def test_a_url_without_files_is_refused(s3: str, tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match="there are no files"):
        fetch_folder(f"{s3}/nothing-here", tmp_path)


def test_a_folder_stays_as_it_is(tmp_path: Path) -> None:
    assert local_folder(tmp_path, tmp_path / "cache") == tmp_path
    assert local_folder(None, tmp_path / "cache") is None
