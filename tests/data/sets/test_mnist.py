import gzip

import numpy as np
import pytest
import torch

from kfac_dist.data import Places, check_finite, fetch, find_case_source
from kfac_dist.data.sets.mnist import MnistReader
from kfac_dist.errors import DataError, DataNotFoundError
from tests.data.formats.idx_files import describe, small_archive, write


def reader(files, tmp_path, data_dir):
    places = Places(data_dir=data_dir, cache_dir=tmp_path / "cache")
    return MnistReader(places=places, archive=describe(files))


@pytest.mark.parametrize("gz", [True, False], ids=["gzip", "plain"])
@pytest.mark.parametrize("subfolder", ["", "mnist"])
def test_files_are_found_in_the_folder_and_in_its_subfolder(gz, subfolder, tmp_path):
    files = small_archive()
    write(files, tmp_path / "data" / subfolder, gz=gz)
    mnist = reader(files, tmp_path, tmp_path / "data")

    assert mnist.images("train").shape == (20, 784)
    assert mnist.labels("test").shape == (8,)
    raw = np.frombuffer(files["t10k-images-idx3-ubyte"][16:], np.uint8)
    assert np.array_equal(mnist.images("test").reshape(-1), raw)


@pytest.mark.parametrize("with_data_dir", [True, False])
def test_the_cache_comes_after_the_given_folder(with_data_dir, tmp_path):
    files = small_archive()
    (tmp_path / "data").mkdir()
    write(files, tmp_path / "cache" / "mnist")

    mnist = reader(files, tmp_path, tmp_path / "data" if with_data_dir else None)

    assert len(mnist.images("train")) == 20


def test_the_given_folder_wins_over_the_cache(tmp_path):
    given, cached = small_archive(num_train=5), small_archive(num_train=9)
    write(given, tmp_path / "data")
    write(cached, tmp_path / "cache" / "mnist")

    assert len(reader(given, tmp_path, tmp_path / "data").images("train")) == 5


def test_without_files_the_message_names_the_three_ways(tmp_path):
    (tmp_path / "data").mkdir()

    with pytest.raises(DataNotFoundError) as caught:
        reader(small_archive(), tmp_path, tmp_path / "data").images("train")

    message = caught.value.message
    assert "train-images-idx3-ubyte" in message
    assert f"--data-dir DIR with it in DIR or DIR/mnist (not in {tmp_path / 'data'}" in message
    assert "KFAC_DIST_DATA" in message
    assert str(tmp_path / "cache" / "mnist") in message
    assert "a download, which failed: no address" in message
    assert caught.value.exit_code == 4


def test_a_given_folder_that_does_not_exist(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"absent \(--data-dir or KFAC_DIST_DATA\)"):
        reader(small_archive(), tmp_path, tmp_path / "absent").images("train")


def test_other_content_of_the_right_shape_is_refused_by_its_checksum(tmp_path):
    files = small_archive()
    altered = dict(files)
    name = "train-images-idx3-ubyte"
    altered[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    write(altered, tmp_path / "data")

    with pytest.raises(DataError, match=rf"{name}.gz: not MNIST's {name}: its md5 unpacked is"):
        reader(files, tmp_path, tmp_path / "data").images("train")


def test_a_file_cut_off_says_so(tmp_path):
    files = small_archive()
    write(files, tmp_path / "data")
    path = tmp_path / "data" / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(files["train-images-idx3-ubyte"][:-100]))

    with pytest.raises(DataError, match=r"cut off: 15596 bytes unpacked; its header says 15696"):
        reader(files, tmp_path, tmp_path / "data").images("train")


def test_real_mnist(mnist_dir, tmp_path):
    places = Places(data_dir=mnist_dir, cache_dir=tmp_path)
    source = find_case_source("mnist", limit=None, places=places, dtype=torch.float32)

    train = source.classification("train")
    test = source.reconstruction("test")

    assert (len(train), len(test)) == (60_000, 10_000)
    inputs, labels = fetch(train, torch.arange(8))
    assert labels.tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert inputs.shape == (8, 1, 28, 28)
    assert test[0][0].shape == (784,)
    assert train.pixels.double().mean().item() / 255 == pytest.approx(0.1306604762738429)
    check_finite(test, "test")
    assert [path.name for path in tmp_path.iterdir()] == ["decoded"]  # nothing was downloaded
