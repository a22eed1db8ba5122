import gzip
import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch

from kfac_dist.data import Places, check_finite, fetch, find_case_source
from kfac_dist.data.sets.cifar10 import CIFAR10, Cifar10Archive, Cifar10Reader
from kfac_dist.errors import DataError, DataNotFoundError
from tests.data.serving import serving

FOLDER = "cifar-10-batches-bin"


def records(labels, seed=0):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (len(labels), 3072)).astype(np.uint8)
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)


FILES = {
    "data_batch_1.bin": records([3, 1], 1),
    "data_batch_2.bin": records([4], 2),
    "test_batch.bin": records([1, 5, 9], 3),
}


def write(folder, files=FILES, pack=bytes, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in files.items():
        (folder / f"{name}{suffix}").write_bytes(pack(table.tobytes()))


def packed():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, table in reversed(FILES.items()):
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = table.size
            archive.addfile(member, io.BytesIO(table.tobytes()))
    return content.getvalue()


def reader(tmp_path, data_dir=None, content=b"", mirrors=()):
    archive = Cifar10Archive(
        name=CIFAR10.name, mirrors=mirrors, md5=hashlib.md5(content).hexdigest()
    )
    return Cifar10Reader(
        places=Places(data_dir=data_dir, cache_dir=tmp_path / "cache"), archive=archive
    )


def check(found):
    images, labels = found.read("train")
    assert labels.tolist() == [3, 1, 4]
    assert images.shape == (3, 3, 32, 32)
    # Planes of colours, each row by row.
    assert images[2, 1, 0, 5] == FILES["data_batch_2.bin"][0, 1 + 1024 + 5]
    assert found.read("test")[1].tolist() == [1, 5, 9]


@pytest.mark.parametrize("subfolder", ["", FOLDER, "cifar10-subset"])
@pytest.mark.parametrize(("pack", "suffix"), [(bytes, ""), (gzip.compress, ".gz")])
def test_files_are_found(subfolder, pack, suffix, tmp_path):
    write(tmp_path / "data" / subfolder, pack=pack, suffix=suffix)

    check(reader(tmp_path, tmp_path / "data"))


def test_a_file_that_is_there_plain_and_gzipped_is_read_once(tmp_path):
    write(tmp_path / "data")
    write(tmp_path / "data", pack=gzip.compress, suffix=".gz")

    check(reader(tmp_path, tmp_path / "data"))


def test_the_archive_may_lie_there_as_it_is(tmp_path):
    content = packed()
    (tmp_path / CIFAR10.name).write_bytes(content)

    check(reader(tmp_path, tmp_path, content))


def test_the_archive_is_downloaded_into_the_cache_once(tmp_path):
    content = packed()
    with serving({f"/{CIFAR10.name}": content}) as (base, requests):
        check(reader(tmp_path, content=content, mirrors=(base,)))

    assert requests == [f"/{CIFAR10.name}"]
    assert (tmp_path / "cache" / "cifar10" / CIFAR10.name).read_bytes() == content


def test_a_wrong_archive_is_refused(tmp_path):
    with (
        serving({f"/{CIFAR10.name}": b"something else"}) as (base, _),
        pytest.raises(DataNotFoundError, match=r"3\. a download, which failed: .* its md5 is"),
    ):
        reader(tmp_path, content=b"right", mirrors=(base,)).read("train")

    assert not (tmp_path / "cache").exists()


def test_without_files_the_message_names_the_ways(tmp_path):
    (tmp_path / "data").mkdir()

    with pytest.raises(DataNotFoundError) as caught:
        reader(tmp_path, tmp_path / "data").read("train")

    message = caught.value.message
    assert "data_batch_*.bin with test_batch.bin (or .gz)" in message
    assert f"DIR/{FOLDER} (not in {tmp_path / 'data'})" in message
    assert "KFAC_DIST_DATA" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes unpacked, not a multiple of 3073"),
        (records([1, 2]).tobytes()[:-1], "6145 bytes unpacked, not a multiple of 3073"),
        (records([1, 10]).tobytes(), "record 1 has the label 10, not one of 0 to 9"),
    ],
)
def test_a_file_that_is_not_right(content, message, tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(content)

    with pytest.raises(DataError, match=message) as caught:
        reader(tmp_path, tmp_path).read("test")
    assert caught.value.message.startswith(f"{tmp_path / 'test_batch.bin'}: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_are_standardised_by_channel_for_a_classifier_only(dtype, tmp_path):
    write(tmp_path)
    places = Places(data_dir=tmp_path, cache_dir=tmp_path)
    source = find_case_source("cifar10", limit=2, places=places, dtype=dtype)

    inputs, labels = fetch(source.classification("train"), torch.arange(2))
    plain, _ = fetch(source.reconstruction("train"), torch.arange(2))

    assert (inputs.shape, inputs.dtype, labels.tolist()) == ((2, 3, 32, 32), dtype, [3, 1])
    raw = FILES["data_batch_1.bin"][:, 1:] / 255
    torch.testing.assert_close(plain, torch.tensor(raw, dtype=dtype))
    blue = (raw.reshape(2, 3, 32, 32)[:, 2] - 0.4465) / 0.2616
    torch.testing.assert_close(inputs[:, 2], torch.tensor(blue, dtype=dtype))
    assert torch.equal(source.classification("train")[1][0], inputs[1])


def test_real_cifar10(cifar10_dir, tmp_path):
    places = Places(data_dir=cifar10_dir, cache_dir=tmp_path)
    source = find_case_source("cifar10", limit=None, places=places, dtype=torch.float32)

    train, test = source.classification("train"), source.classification("test")

    assert len(train) >= 10_000
    assert len(test) >= 2_000
    check_finite(test, "test")
    inputs, labels = fetch(train, torch.arange(10_000))
    assert labels.bincount(minlength=10).min() > 800
    # Standardised with numbers of the whole set: near 0 and 1 on any large part of it.
    assert inputs.mean(dim=(0, 2, 3)).abs().max() < 0.05
    assert (inputs.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05
