import hashlib

import pytest
import torch

from kfac_dist.data import Places, TextSource, fetch
from kfac_dist.errors import DataError, DataNotFoundError, InvalidSpecError

TEXT = "hello, wörld\n" * 10  # 130 characters: 117 train, 13 test


def source(folder, limit=None):
    return TextSource(limit=limit, places=Places(data_dir=folder, cache_dir=folder / "cache"))


def write(folder, text=TEXT, name="input.txt"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def decode(found, codes):
    return "".join(found.vocabulary()[code] for code in codes)


def test_the_vocabulary_is_the_sorted_characters(tmp_path):
    write(tmp_path)

    assert source(tmp_path).vocabulary() == "\n ,dehlorwö"


@pytest.mark.parametrize(("stride", "num_windows"), [(5, 23), (2, 56), (7, 16)])
def test_windows_and_the_next_characters(stride, num_windows, tmp_path):
    write(tmp_path)
    found = source(tmp_path)

    windows = found.windows("train", context=5, stride=stride)
    inputs, targets = fetch(windows, torch.tensor([num_windows - 1, 0]))

    assert len(windows) == num_windows
    assert (inputs.dtype, inputs.shape, targets.shape) == (torch.int64, (2, 5), (2, 5))
    last = (num_windows - 1) * stride
    assert decode(found, inputs[0]) == TEXT[last : last + 5]
    assert decode(found, targets[0]) == TEXT[last + 1 : last + 6]
    assert decode(found, targets[1]) == "ello,"
    assert last + 6 <= 117 < last + 6 + stride
    assert torch.equal(windows[0][1], targets[1])


def test_the_last_tenth_is_the_test_split(tmp_path):
    write(tmp_path)
    found = source(tmp_path)

    (window,) = found.windows("test", context=12, stride=12)

    assert decode(found, window[0]) + decode(found, window[1][-1:]) == TEXT[117:]


def test_limit_keeps_the_first_windows(tmp_path):
    write(tmp_path)

    assert len(source(tmp_path, limit=3).windows("train", context=5, stride=5)) == 3
    with pytest.raises(InvalidSpecError, match=r"data\.limit: 99 is more than the 23 training"):
        source(tmp_path, limit=99).windows("train", context=5, stride=5)


@pytest.mark.parametrize("place", ["input.txt", "text/input.txt", "novel.txt", "text/novel.txt"])
def test_where_the_file_is_looked_for(place, tmp_path):
    path = tmp_path / place
    write(path.parent, name=path.name)

    assert len(source(tmp_path).vocabulary()) == 11


def test_input_txt_wins_over_other_texts(tmp_path):
    write(tmp_path / "text")
    write(tmp_path, "a", "a.txt")
    write(tmp_path, "b", "b.txt")

    assert len(source(tmp_path).vocabulary()) == 11


def test_several_texts_are_not_guessed_among(tmp_path):
    write(tmp_path, name="b.txt")
    write(tmp_path, name="a.txt")

    with pytest.raises(
        DataNotFoundError, match=r"fit: a\.txt, b\.txt\. Rename the right one to input\.txt"
    ):
        source(tmp_path).vocabulary()


def test_no_text_at_all(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"text: input\.txt or \*\.txt was not found") as e:
        source(tmp_path).vocabulary()
    assert f"DIR or DIR/text (not in {tmp_path})" in e.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain \xff text", r"input\.txt: not UTF-8 text: the byte 0xff at offset 6"),
        (b"", r"input\.txt: the file is empty"),
    ],
)
def test_a_file_that_is_no_text(content, message, tmp_path):
    write(tmp_path, content)

    with pytest.raises(DataError, match=message):
        source(tmp_path).vocabulary()


@pytest.mark.parametrize(("split", "context", "has"), [("test", 13, 13), ("train", 117, 117)])
def test_a_text_shorter_than_a_window(split, context, has, tmp_path):
    write(tmp_path)

    message = rf"task_args\.context: {context} .* {split} split has: {has} of the 130 characters"
    with pytest.raises(InvalidSpecError, match=message):
        source(tmp_path).windows(split, context=context, stride=1)


def test_tiny_shakespeare(text_dir):
    found = source(text_dir)
    digest = hashlib.md5(found._path().read_bytes(), usedforsecurity=False).hexdigest()
    if digest != "6fb458f1232090904fb40fe944165e91":
        pytest.skip(f"{found._path()} is another text")

    windows = found.windows("train", context=64, stride=64)

    assert len(found.vocabulary()) == 65
    assert (len(windows), len(found.windows("test", context=64, stride=64))) == (15685, 1742)
    assert decode(found, windows[0][0][:14]) == "First Citizen:"
