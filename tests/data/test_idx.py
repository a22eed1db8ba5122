import gzip

import numpy as np
import pytest

from kfac_dist.data.idx import parse_idx, read_unpacked, unpack
from kfac_dist.errors import DataError, DataNotFoundError
from tests.data.idx_files import idx_bytes

IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_round_trip(pack, tmp_path):
    path = tmp_path / "images"
    path.write_bytes(pack(idx_bytes(IMAGES)))

    array = parse_idx(read_unpacked(path), path, (3, 4))

    assert np.array_equal(array, IMAGES)
    assert array.flags.writeable  # torch warns about tensors of read-only memory


def test_labels_have_no_dimensions_but_the_number_of_cases():
    labels = np.array([3, 1, 4], np.uint8)

    assert parse_idx(idx_bytes(labels), "labels", ()).tolist() == [3, 1, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off: 0 bytes, the IDX header alone has 16"),
        (idx_bytes(IMAGES)[:10], "cut off: 10 bytes"),
        (idx_bytes(IMAGES)[:-1], "cut off: 39 bytes unpacked, its header says 40"),
        (idx_bytes(IMAGES) + b"x", "too long: 41 bytes unpacked, its header says 40"),
        (b"<html>not found</html>", "not an IDX file of 3-dimensional bytes"),
        (b"\0\0\x0d\3" + idx_bytes(IMAGES)[4:], "starts with 00000d03"),
        (idx_bytes(IMAGES.reshape(2, 4, 3)), r"shape \(4, 3\), it should be \(3, 4\)"),
    ],
)
def test_refuses_what_is_not_exactly_right(content, message):
    with pytest.raises(DataError, match=message) as caught:
        parse_idx(content, "folder/images", (3, 4))
    assert caught.value.message.startswith("folder/images: ")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "header only"])
def test_refuses_a_damaged_gzip(damage):
    content = bytearray(gzip.compress(idx_bytes(IMAGES)))
    if damage == "truncated":
        del content[-12:]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:
        del content[2:]

    with pytest.raises(DataError, match=r"images\.gz: not a whole gzip file"):
        unpack(bytes(content), "images.gz")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataNotFoundError, match="cannot be read: No such file"):
        read_unpacked(tmp_path / "absent")
