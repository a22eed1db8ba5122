import numpy as np
import pytest
import torch

from kfac_dist.data import Places, check_finite, fetch, find_case_source
from kfac_dist.data.formats.npz_file import NpzFile
from kfac_dist.errors import DataError, DataNotFoundError, InvalidSpecError

GENERATOR = np.random.default_rng(0)
VECTORS = GENERATOR.normal(size=(6, 4))
IMAGES = GENERATOR.integers(0, 256, (6, 5, 7)).astype(np.uint8)
LABELS = np.array([0, 2, 1, 2, 0, 1])


def save(folder, save_with=np.savez, **arrays):
    save_with(folder / "data.npz", **arrays)


def vectors(**changes):
    arrays = {
        "x_train": VECTORS,
        "y_train": LABELS,
        "x_test": VECTORS[:2],
        "y_test": LABELS[:2],
    }
    return {name: value for name, value in (arrays | changes).items() if value is not None}


def source(folder, limit=None, dtype=torch.float64):
    places = Places(data_dir=folder, cache_dir=folder / "cache")
    return find_case_source("npz", limit=limit, places=places, dtype=dtype)


@pytest.mark.parametrize("save_with", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_vectors_are_taken_as_they_are(save_with, order, tmp_path):
    save(tmp_path, save_with, **vectors(x_train=np.array(VECTORS, order=order)))
    found = source(tmp_path)

    inputs, labels = fetch(found.classification("train"), torch.tensor([5, 1]))

    assert (found.case_shape(), found.num_classes()) == ((4,), 3)
    np.testing.assert_array_equal(inputs, VECTORS[[5, 1]])
    assert (labels.dtype, labels.tolist()) == (torch.int64, [1, 2])
    assert len(found.classification("test")) == 2
    check_finite(found.classification("train"), "train")


@pytest.mark.parametrize("save_with", [np.savez, np.savez_compressed])
def test_8_bit_images_are_scaled(save_with, tmp_path):
    save(tmp_path, save_with, **vectors(x_train=IMAGES, x_test=IMAGES[:2]))
    found = source(tmp_path, dtype=torch.float32)

    inputs, _ = fetch(found.classification("train"), torch.arange(6))
    flat, targets = fetch(found.reconstruction("train"), torch.arange(6))

    assert found.case_shape() == (1, 5, 7)
    torch.testing.assert_close(inputs, torch.tensor(IMAGES[:, None] / 255, dtype=torch.float32))
    assert torch.equal(flat, inputs.reshape(6, 35))
    assert targets is flat


@pytest.mark.parametrize(
    ("shape", "case_shape"),
    [
        ((6, 3, 8, 9), (3, 8, 9)),
        ((6, 8, 9, 3), (3, 8, 9)),
        ((6, 8, 9, 1), (1, 8, 9)),
        ((6, 8, 9, 10), (8, 9, 10)),
        ((6, 3, 3, 3), (3, 3, 3)),
    ],
)
def test_channels_come_first(shape, case_shape, tmp_path):
    images = GENERATOR.normal(size=shape)
    save(tmp_path, **vectors(x_train=images, x_test=images))
    found = source(tmp_path)

    inputs, _ = found.classification("train")[2]

    assert found.case_shape() == tuple(inputs.shape) == case_shape
    moved = images if shape[1:] == case_shape else images.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(inputs, moved[2])


@pytest.mark.parametrize("kind", [">f8", "<f2", "u2", "i8", "bool", "longdouble"])
def test_any_numbers_are_converted(kind, tmp_path):
    values = np.array([[0, 1, 1], [1, 0, 1]])
    save(tmp_path, **vectors(x_train=values.astype(kind), y_train=np.array([[0], [1]], ">i4")))

    inputs, labels = fetch(source(tmp_path).classification("train"), torch.arange(2))

    assert inputs.tolist() == values.tolist()
    assert labels.tolist() == [0, 1]


def test_what_is_mapped_is_not_written_back(tmp_path):
    save(tmp_path, x_train=IMAGES)

    array = NpzFile(path=tmp_path / "data.npz").array("x_train")
    array[:] = 0

    assert isinstance(array, np.memmap)
    assert np.array_equal(NpzFile(path=tmp_path / "data.npz").array("x_train"), IMAGES)


def test_limit_and_cases_without_labels(tmp_path):
    save(tmp_path, **vectors(y_train=None, y_test=None))
    found = source(tmp_path, limit=3)

    assert (len(found.reconstruction("train")), len(found.reconstruction("test"))) == (3, 2)
    with pytest.raises(InvalidSpecError, match=r"data\.npz has no y_train, .* needs labels"):
        found.num_classes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": None}, r"the array x_train is missing \(it has y_train, x_test, y_test\)"),
        ({"x_test": None}, "the array x_test is missing"),
        ({"x_train": np.zeros(3)}, r"x_train has shape \(3,\); it must be"),
        ({"x_train": np.zeros((0, 4))}, r"x_train has shape \(0, 4\); it must be"),
        ({"x_test": np.zeros((2, 5))}, r"a case of x_test has shape \(5,\), of x_train \(4,\)"),
        ({"x_train": np.array([["a", "b"]])}, "x_train holds <U1; it must hold numbers"),
        ({"x_train": np.array([[None]])}, "x_train holds Python objects, which are never unpick"),
        ({"y_train": LABELS[:5]}, "x_train has 6 cases but y_train has 5"),
        ({"y_train": LABELS - 1}, "y_train has the label -1; classes count from 0"),
        ({"y_train": LABELS / 2}, "y_train is an array of float64 .* must hold class indices"),
        ({"y_train": np.zeros((6, 2), int)}, r"y_train is an array of int64 with shape \(6, 2\)"),
        ({"y_test": np.array([0, 3])}, "y_test has the label 3, y_train only 0 to 2"),
    ],
)
def test_arrays_that_do_not_fit(changes, message, tmp_path):
    save(tmp_path, **vectors(**changes))

    with pytest.raises(DataError, match=message) as caught:
        [source(tmp_path).classification(split) for split in ("train", "test")]
    assert str(tmp_path / "data.npz") in caught.value.message


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "data.npz").write_bytes(b"x_train = 3")

    with pytest.raises(DataError, match=r"data\.npz: not an npz file"):
        source(tmp_path).case_shape()


def test_a_damaged_file(tmp_path):
    save(tmp_path, np.savez_compressed, **vectors())
    path = tmp_path / "data.npz"
    content = bytearray(path.read_bytes())
    content[60:120] = bytes(60)
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"data\.npz: x_train "):
        source(tmp_path).reconstruction("train")


def test_no_file_at_all(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"npz: data\.npz or \*\.npz was not found"):
        source(tmp_path).case_shape()
