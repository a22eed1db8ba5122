import gzip
import os

import pytest

from kfac_dist.data import Places
from kfac_dist.data.sets.mnist import MnistReader
from kfac_dist.errors import DataNotFoundError
from tests.data.formats.idx_files import describe, small_archive
from tests.data.serving import serving

IMAGES = "train-images-idx3-ubyte"


def packed(files):
    return {f"/{name}.gz": gzip.compress(content) for name, content in files.items()}


def reader(files, cache_dir, *mirrors):
    places = Places(data_dir=None, cache_dir=cache_dir)
    return MnistReader(places=places, archive=describe(files, mirrors))


def test_downloads_into_the_cache_once(tmp_path):
    files = small_archive()
    with serving(packed(files)) as (base, requests):
        assert len(reader(files, tmp_path, base).images("train")) == 20
        assert len(reader(files, tmp_path, base).images("train")) == 20

    assert requests == [f"/{IMAGES}.gz"]
    assert [path.name for path in (tmp_path / "mnist").iterdir()] == [f"{IMAGES}.gz"]


def test_the_next_mirror_is_tried(tmp_path):
    files = small_archive()
    wrong = {path: gzip.compress(b"something else") for path in packed(files)}
    with (
        serving({}) as (empty, _),
        serving(wrong) as (false, _),
        serving(packed(files)) as (good, _),
    ):
        assert len(reader(files, tmp_path, empty, false, good).images("train")) == 20


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(tmp_path):
    files = small_archive()
    wrong = {path: gzip.compress(b"something else") for path in packed(files)}
    with (
        serving(wrong) as (base, _),
        pytest.raises(DataNotFoundError, match=r"which failed: .*its md5 unpacked is"),
    ):
        reader(files, tmp_path, base).images("train")

    assert not (tmp_path / "mnist").exists()


@pytest.mark.parametrize(
    ("answers", "cut", "problem"),
    [
        ({}, False, "HTTP Error 404"),
        ({f"/{IMAGES}.gz": b"\x1f\x8bnot gzip"}, False, "a damaged gzip file"),
        ({f"/{IMAGES}.gz": b"x" * 1000}, True, "500"),
    ],
)
def test_what_failed_is_in_the_message(answers, cut, problem, tmp_path):
    with (
        serving(answers, cut=cut) as (base, _),
        pytest.raises(DataNotFoundError, match=f"which failed: .*{problem}"),
    ):
        reader(small_archive(), tmp_path, base).images("train")


def test_no_server_at_all(tmp_path):
    with serving({}) as (base, _):
        pass

    with pytest.raises(DataNotFoundError, match=r"which failed: .*refused"):
        reader(small_archive(), tmp_path, base).images("train")


def test_a_cache_that_cannot_be_made(tmp_path):
    files = small_archive()
    (tmp_path / "file").write_text("in the way")
    with (
        serving(packed(files)) as (base, _),
        pytest.raises(DataNotFoundError, match=r"the cache .* cannot be written: Not a directory"),
    ):
        reader(files, tmp_path / "file", base).images("train")


def test_readers_never_see_a_part_of_a_file(tmp_path, monkeypatch):
    """The content is on disk before the name is: what fails in between leaves nothing behind."""
    files = small_archive()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with (
        serving(packed(files)) as (base, _),
        pytest.raises(DataNotFoundError, match="cannot be written: No space left"),
    ):
        reader(files, tmp_path, base).images("train")

    assert list((tmp_path / "mnist").iterdir()) == []
