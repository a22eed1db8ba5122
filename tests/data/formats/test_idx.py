import numpy as np
import pytest

from kfac_dist.data.formats.idx import parse_idx
from kfac_dist.errors import DataError
from tests.data.formats.idx_files import idx_bytes

IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def test_round_trip():
    array = parse_idx(idx_bytes(IMAGES), "images", (3, 4))

    assert np.array_equal(array, IMAGES)
    assert array.flags.writeable  # torch warns about tensors of read-only memory


def test_labels_have_no_dimensions_but_the_number_of_cases():
    labels = np.array([3, 1, 4], np.uint8)

    assert parse_idx(idx_bytes(labels), "labels", ()).tolist() == [3, 1, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off: 0 bytes, but the IDX header alone has 16"),
        (idx_bytes(IMAGES)[:10], "cut off: 10 bytes"),
        (idx_bytes(IMAGES)[:-1], "cut off: 39 bytes unpacked; its header says 40"),
        (idx_bytes(IMAGES) + b"x", "too long: 41 bytes unpacked; its header says 40"),
        (b"<html>not found</html>", "not an IDX file of 3-dimensional bytes"),
        (b"\0\0\x0d\3" + idx_bytes(IMAGES)[4:], "starts with 00000d03"),
        (idx_bytes(IMAGES.reshape(2, 4, 3)), r"shape \(4, 3\) instead of \(3, 4\)"),
    ],
)
def test_refuses_what_is_not_exactly_right(content, message):
    with pytest.raises(DataError, match=message) as caught:
        parse_idx(content, "folder/images", (3, 4))
    assert caught.value.message.startswith("folder/images: ")
