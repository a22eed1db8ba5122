import numpy as np
import pytest
import torch
from scipy.io import savemat

from kfac_dist.data import Places, fetch, find_case_source
from kfac_dist.errors import DataError, DataNotFoundError, InvalidSpecError

GENERATOR = np.random.default_rng(0)
PATCHES = 3 + 2 * GENERATOR.normal(size=(80, 625))


def source(folder, limit=None, dtype=torch.float64):
    places = Places(data_dir=folder, cache_dir=folder / "cache")
    return find_case_source("faces", limit=limit, places=places, dtype=dtype)


def cases(dataset):
    return fetch(dataset, torch.arange(len(dataset)))[0].numpy()


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("faces/olivettifaces.mat", lambda path, **arrays: savemat(path, arrays)),
        ("mine.mat", lambda path, **arrays: savemat(path, arrays, do_compression=True)),
        ("faces.npz", np.savez),
    ],
)
def test_the_largest_table_is_read_and_standardised(name, save, transposed, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    faces = PATCHES.T if transposed else PATCHES
    save(tmp_path / name, people=np.zeros((1, 40)), faces=faces, names=np.array(["a", "b"]))
    found = source(tmp_path)

    train, test = cases(found.reconstruction("train")), cases(found.reconstruction("test"))

    assert found.case_shape() == (625,)
    assert (train.shape, test.shape) == ((60, 625), (20, 625))
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-12)
    assert train.var(axis=0).mean() == pytest.approx(1)
    # One number for all pixels: which pixel varies most stays visible.
    spread = train.std(axis=0) / PATCHES[:60].std(axis=0)
    np.testing.assert_allclose(spread, spread[0])
    np.testing.assert_allclose(test, (PATCHES[60:] - PATCHES[:60].mean(axis=0)) * spread[0])


def test_faces_in_8_bits(tmp_path):
    faces = GENERATOR.integers(0, 256, (4096, 40)).astype(np.uint8)
    savemat(tmp_path / "olivettifaces.mat", {"faces": faces})

    found = source(tmp_path, limit=7, dtype=torch.float32)
    inputs, targets = fetch(found.reconstruction("train"), torch.arange(7))

    assert (found.case_shape(), inputs.shape, inputs.dtype) == ((4096,), (7, 4096), torch.float32)
    assert targets.data_ptr() != 0
    assert torch.equal(inputs, targets)
    pixel = faces[11].astype(float)
    order = np.argsort(pixel[:7])
    assert np.array_equal(np.argsort(inputs[:, 11].numpy()), order)


def test_hintons_patches_are_taken_as_they_are_and_split_as_the_papers_do(tmp_path):
    savemat(tmp_path / "newfaces_rot_single.mat", {"newfaces_single": PATCHES.T.astype("f4")})
    found = source(tmp_path)

    train, test = cases(found.reconstruction("train")), cases(found.reconstruction("test"))

    # 25 of 40 people train, the last 10 test; 103,500 and 41,400 of 165,600 patches.
    np.testing.assert_array_equal(train, PATCHES[:50].astype("f4"))
    np.testing.assert_array_equal(test, PATCHES[60:].astype("f4"))


def test_nothing_to_classify(tmp_path):
    with pytest.raises(InvalidSpecError, match=r"data\.name: faces has no labels"):
        source(tmp_path).num_classes()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"faces": np.zeros((10, 100))}, r"shape \(10, 100\): exactly one side must be 625"),
        ({"faces": np.zeros((625, 4096))}, r"shape \(625, 4096\): exactly one side"),
        (
            {"faces": np.zeros((3, 25, 25))},
            r"no two-dimensional .*; its arrays: faces \(3, 25",
        ),
        ({"faces": np.ones((40, 625))}, "all training faces are the same"),
        ({}, "arrays: none"),
    ],
)
@pytest.mark.parametrize("name", ["faces.mat", "faces.npz"])
def test_arrays_that_do_not_fit(name, arrays, message, tmp_path):
    if name == "faces.mat":
        savemat(tmp_path / name, arrays)
    else:
        np.savez(tmp_path / name, **arrays)

    with pytest.raises(DataError, match=message) as caught:
        source(tmp_path).reconstruction("train")
    assert caught.value.message.startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize("damage", ["text", "truncated", "empty", "version 7.3", "flipped"])
def test_a_damaged_mat_file(damage, tmp_path):
    path = tmp_path / "faces.mat"
    savemat(path, {"faces": PATCHES}, do_compression=True)
    content = path.read_bytes()
    version = content[:124] + b"\x00\x02IM" + content[128:]
    path.write_bytes(
        {
            "text": b"these are no faces " * 10,
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "version 7.3": version,
            "flipped": content[:4000] + bytes(100) + content[4100:],
        }[damage]
    )

    with pytest.raises(DataError, match=rf"^{path}: "):
        source(tmp_path).reconstruction("train")


def test_no_file_at_all(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"faces: newfaces_rot_single\.mat or .*\*\.npz"):
        source(tmp_path).case_shape()
