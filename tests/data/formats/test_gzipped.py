import gzip

import pytest

from kfac_dist.data.formats.gzipped import read_unpacked, unpack
from kfac_dist.errors import DataError, DataNotFoundError

CONTENT = bytes(range(256)) * 4


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_round_trip(pack, tmp_path):
    (tmp_path / "file").write_bytes(pack(CONTENT))

    assert read_unpacked(tmp_path / "file") == CONTENT


@pytest.mark.parametrize("damage", ["truncated", "flipped", "header only"])
def test_refuses_a_damaged_gzip(damage):
    content = bytearray(gzip.compress(CONTENT))
    if damage == "truncated":
        del content[-12:]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:
        del content[2:]

    with pytest.raises(DataError, match=r"images\.gz: a damaged gzip file"):
        unpack(bytes(content), "images.gz")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataNotFoundError, match="cannot be read: No such file"):
        read_unpacked(tmp_path / "absent")
