"""A folder behind a URL: local files, memory, and an S3 server on this machine."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfac_dist.errors import NotFoundError, UnreachableError, UsageError
from kfac_dist.runs.transfer.remote import RemoteFolder
from tests.runs.transfer.local_s3 import s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as url:
        yield url


@pytest.fixture(params=["file", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteFolder:
    if request.param == "s3":
        return RemoteFolder(f"{request.getfixturevalue('s3')}/{secrets.token_hex(4)}")
    path = tmp_path / "remote" if request.param == "file" else f"/{secrets.token_hex(4)}"
    return RemoteFolder(f"{request.param}://{path}")


def test_files_go_there_and_come_back(folder: RemoteFolder, tmp_path: Path) -> None:
    assert folder.files() == {}
    assert folder.read("logs/a.log") is None
    source = tmp_path / "source"
    for content in (b"first", b"second, longer"):
        source.write_bytes(content)
        folder.put(source, "logs/a.log")
        folder.put(source, "b.json")
        assert folder.read("logs/a.log") == content
        assert {n: file.num_bytes for n, file in folder.files().items()} == {
            "b.json": len(content),
            "logs/a.log": len(content),
        }
    folder.below("logs").get("a.log", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"second, longer"
    with pytest.raises(NotFoundError, match=r"has no file none\.log"):
        folder.get("none.log", tmp_path / "back")
    folder.remove("logs")
    folder.remove("logs")
    assert list(folder.files()) == ["b.json"]


def test_a_url_may_be_that_of_one_file(folder: RemoteFolder, tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(b"numbers")
    folder.put(tmp_path / "data.npz", "data.npz")
    one = folder.below("data.npz")
    assert list(one.files()) == ["data.npz"]
    one.get("data.npz", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"numbers"


def test_a_storage_that_does_not_answer_is_named_without_its_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("x")
    blocked = RemoteFolder(f"file://{tmp_path}/x/below")  # below a file there can be nothing
    with pytest.raises(UnreachableError, match="cannot write a "):
        blocked.put(tmp_path / "x", "a")

    def refuse(url: str) -> None:
        raise OSError("403 for https://me:pw@host/f?X-Amz-Signature=abc&x=y (a/b)")

    monkeypatch.setattr("fsspec.core.url_to_fs", refuse)
    with pytest.raises(UnreachableError) as caught:
        RemoteFolder("file:///nowhere").files()
    assert caught.value.message == (
        "file:///nowhere: cannot open it: OSError: 403 for https://host/f (a/b)"
    )


def test_a_bucket_that_does_not_exist_is_unreachable(s3: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(UnreachableError, match="cannot write a "):
        RemoteFolder("s3://nobody-has-made-this/f").put(tmp_path / "x", "a")


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("/data", "must be a URL such as s3://BUCKET/FOLDER"),
        ("s3://me:secret@host/x", "'s3://host/x' must have no user, password"),
        ("https://host/x?sig=secret", "'https://host/x' must have no user"),
        ("s3://", "must name a folder after s3://"),
    ],
)
def test_what_is_not_the_url_of_a_folder_is_refused(url: str, part: str) -> None:
    with pytest.raises(UsageError, match=part) as caught:
        RemoteFolder(url)
    assert "secret" not in caught.value.message


def test_a_missing_library_is_named() -> None:
    with pytest.raises(UsageError, match=r"gcsfs.*pip install 'kfac-dist\[gs\]'"):
        RemoteFolder("gs://bucket/x").files()
    with pytest.raises(UsageError, match="not-known"):
        RemoteFolder("not-known://bucket/x").files()
