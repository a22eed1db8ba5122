"""The sets that need no files: mnist-5k and curves, and the door to all sets."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import label

from kfac_dist.data import Places, fetch, find_case_source
from kfac_dist.data.sets.curves import NUM_CASES, SIDE, control_points, load_curves
from kfac_dist.data.sets.digits import load_digits
from kfac_dist.errors import InvalidSpecError


def source(name, limit=None, dtype=torch.float32):
    places = Places(data_dir=None, cache_dir=Path("absent"))
    return find_case_source(name, limit=limit, places=places, dtype=dtype)


def test_digits_are_split_evenly_and_take_turns():
    train_images, train_digits = load_digits("train")
    test_images, test_digits = load_digits("test")

    assert (train_images.shape, test_images.shape) == ((4500, 784), (500, 784))
    assert np.array_equal(train_digits, np.tile(np.arange(10), 450))
    assert np.array_equal(test_digits, np.tile(np.arange(10), 50))
    rows = {row.tobytes() for row in np.concatenate([train_images, test_images])}
    assert len(rows) == 5000  # no image is in both


def test_the_split_of_the_digits_never_changes():
    digest = hashlib.sha256(load_digits("train")[0].tobytes()).hexdigest()[:12]

    assert digest == "e8da42524cb0"


def test_curves_are_the_same_every_time_and_a_limit_keeps_the_first():
    many, few = load_curves("train", 700), load_curves("train", 30)

    assert np.array_equal(many[:30], few)
    assert not np.array_equal(load_curves("test", 30), few)


def test_curves_pass_through_their_points_and_stay_inside():
    points = control_points("train", 500)
    images = load_curves("train", 500).reshape(-1, SIDE, SIDE)

    column, row = (np.floor(points).astype(int)[..., axis] for axis in (0, 1))
    at_middle = images[np.arange(500), row[:, 1], column[:, 1]]
    assert at_middle.min() > 100
    assert images.reshape(500, -1).max(axis=1).min() > 150


def test_a_curve_is_one_smooth_stroke():
    images = load_curves("train", 100).reshape(-1, SIDE, SIDE)

    for image in images:
        assert label(image > 60, structure=np.ones((3, 3)))[1] == 1
        assert ((image > 0) & (image < 255)).sum() > 10  # anti-aliased


def test_straight_strokes_have_full_ink_whatever_their_direction():
    """The ink across a straight stroke is the pen's profile, so its sum measures the length."""
    points = control_points("train", 2000)
    legs = points[:, 1] - points[:, 0], points[:, 2] - points[:, 1]
    turn = np.abs(legs[0][:, 0] * legs[1][:, 1] - legs[0][:, 1] * legs[1][:, 0])
    first, second = (np.linalg.norm(leg, axis=1) for leg in legs)
    lengths = first + second
    even = np.maximum(first, second) < 2.5 * np.minimum(first, second)
    straight = (turn < 2.0) & (lengths > 8) & even
    assert straight.sum() > 10

    ink = load_curves("train", 2000)[straight].sum(axis=1) / 255
    pen = 0.75 * np.sqrt(2 * np.pi)
    np.testing.assert_allclose(ink, pen * lengths[straight], rtol=0.02)


def test_curves_have_the_papers_numbers_of_cases():
    assert NUM_CASES == {"train": 20_000, "test": 10_000}
    assert len(source("curves", limit=12_000).reconstruction("test")) == 10_000


@pytest.mark.parametrize("name", ["mnist-5k", "curves"])
def test_images_are_their_own_targets_in_the_dtype_of_the_job(name):
    dataset = source(name, limit=20, dtype=torch.float64).reconstruction("train")
    inputs, targets = fetch(dataset, torch.arange(20))

    assert len(dataset) == 20
    assert inputs.dtype == torch.float64
    assert (inputs.min(), inputs.max()) == (0, 1)
    assert targets is inputs


def test_labels_of_digits():
    dataset = source("mnist-5k", limit=30).classification("test")

    assert fetch(dataset, torch.arange(30))[1].tolist() == list(range(10)) * 3


def test_curves_have_no_labels():
    with pytest.raises(InvalidSpecError, match=r"data\.name: curves has no labels"):
        source("curves").classification("train")


@pytest.mark.parametrize(("name", "size"), [("mnist-5k", 4500), ("curves", 20_000)])
def test_a_limit_above_the_size_says_the_size(name, size):
    with pytest.raises(InvalidSpecError, match=rf"more than the {size} training cases of {name}"):
        source(name, limit=size + 1).reconstruction("train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "minst",
            r"minst is not .* \(mnist, mnist-5k, .*, text\)\. Did you mean mnist\?",
        ),
        (None, "null is not a data set of built-in tasks"),
        ("text", "text does not fit this task, which takes mnist, mnist-5k, "),
    ],
)
def test_an_unknown_name_gets_a_suggestion(name, message):
    with pytest.raises(InvalidSpecError, match=message):
        source(name)
