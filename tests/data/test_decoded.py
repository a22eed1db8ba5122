"""Arrays are decoded once, by whichever process comes first, and mapped by all."""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kfac_dist.data.decoded import Arrays, decoded_arrays
from kfac_dist.errors import DataError

VALUES = np.arange(24).reshape(4, 6)


class Decoder:
    """Reads numbers from a text file, and counts how often."""

    def __init__(self, folder: Path) -> None:
        self.source, self.cache = folder / "numbers.txt", folder / "cache"
        self.source.write_text(" ".join(map(str, VALUES.flat)))
        self.calls = 0

    def __call__(self) -> Arrays:
        self.calls += 1
        return {"table": np.array(self.source.read_text().split(), int).reshape(-1, 6)}

    def read(self, what: str = "numbers") -> NDArray[np.int64]:
        return decoded_arrays(self.cache, [self.source], what, self)["table"]


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    return Decoder(tmp_path)


def test_arrays_are_decoded_once_and_mapped_for_every_reader(decoder: Decoder) -> None:
    first, second = decoder.read(), decoder.read()
    assert decoder.calls == 1
    assert isinstance(first, np.memmap)
    first[0, 0] = 99  # a private copy of the page, as torch may write to what it is given
    assert np.array_equal(second, VALUES)
    assert np.array_equal(decoder.read(), VALUES)
    assert np.array_equal(decoder.read("something else"), VALUES)
    assert decoder.calls == 2


def test_a_source_that_changes_is_decoded_again_even_if_its_times_are_set_back(decoder) -> None:
    old = decoder.read()
    times = decoder.source.stat()
    changed = VALUES[::-1]
    decoder.source.write_text(" ".join(map(str, changed.flat)))
    os.utime(decoder.source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert np.array_equal(decoder.read(), changed)
    assert np.array_equal(old, VALUES)


def test_what_nobody_has_used_for_a_week_is_removed_once_its_source_has_changed(decoder) -> None:
    decoder.read()
    (entry,) = (path for path in (decoder.cache / "decoded").iterdir() if path.is_dir())
    os.utime(entry, (0, 0))
    decoder.source.write_text("1 2 3 4 5 6")
    decoder.read()
    assert not entry.exists()


def test_a_file_that_is_not_whole_is_written_again(decoder) -> None:
    decoder.read()
    (path,) = decoder.cache.rglob("*.npy")
    path.write_bytes(path.read_bytes()[:-8])
    assert np.array_equal(decoder.read(), VALUES)
    assert decoder.calls == 2


def test_of_many_readers_at_once_one_decodes(decoder) -> None:
    found: list[NDArray[np.int64]] = []
    threads = [threading.Thread(target=lambda: found.append(decoder.read())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert decoder.calls == 1
    assert all(np.array_equal(array, VALUES) for array in found)


def test_what_a_killed_process_left_is_in_nobodys_way(decoder) -> None:
    decoder.read()
    (entry,) = (path for path in (decoder.cache / "decoded").iterdir() if path.is_dir())
    name, _, _ = entry.name.rpartition("-")
    left = entry.rename(entry.with_name(f".writing-{name}"))
    assert np.array_equal(decoder.read(), VALUES)
    assert not left.exists()


def test_without_a_usable_cache_each_reader_decodes_and_is_warned_once(
    decoder,
) -> None:
    decoder.cache.write_text("a file where the folder would be")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for what in ("numbers", "others"):
            assert np.array_equal(decoder.read(what), VALUES)
    (warning,) = caught
    assert "cannot be used" in str(warning.message)
    assert "holds all of it" in str(warning.message)


def test_a_full_cache_costs_no_second_decoding(decoder, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert np.array_equal(decoder.read(), VALUES)
    assert decoder.calls == 1
    assert not list(decoder.cache.rglob("*.npy"))
    assert not list(decoder.cache.rglob(".writing-*"))


def test_what_was_decoded_is_read_though_nothing_can_be_written(decoder, monkeypatch) -> None:
    decoder.read()
    monkeypatch.setattr(os, "utime", lambda *_: (_ for _ in ()).throw(OSError(30, "read-only")))
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("nothing is to be written"))
    assert np.array_equal(decoder.read(), VALUES)
    assert decoder.calls == 1


def test_a_source_that_cannot_be_decoded_leaves_nothing(decoder) -> None:
    def refuse() -> Arrays:
        raise DataError("not numbers")

    with pytest.raises(DataError, match="not numbers"):
        decoded_arrays(decoder.cache, [decoder.source], "numbers", refuse)
    assert not [path for path in (decoder.cache / "decoded").iterdir() if path.is_dir()]
    shutil.rmtree(decoder.cache)
    assert np.array_equal(decoder.read(), VALUES)
