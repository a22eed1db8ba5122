import math

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from kfac_dist.core.passes.target_range import TargetRange
from kfac_dist.data import ArrayDataset, ImageDataset, check_finite, fetch, limit_cases
from kfac_dist.errors import DataError, InvalidSpecError

INDICES = torch.tensor([4, 0, 3])


class Items(Dataset):
    """Any map-style data set, here around a list."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def gather_cases(self, count):
        raise AssertionError("only a BatchedDataset has our gather_cases, whatever its name")


def arrays(num_cases=6):
    inputs = torch.arange(num_cases * 3, dtype=torch.float32).reshape(num_cases, 3)
    return inputs, inputs.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", ["array", "tensor", "items", "numpy"])
def test_fetch_stacks_the_cases_in_the_order_asked_for(kind):
    inputs, targets = arrays()
    dataset = {
        "array": ArrayDataset(inputs, targets),
        "tensor": TensorDataset(inputs, targets),
        "items": Items(list(zip(inputs, targets, strict=True))),
        "numpy": Items(list(zip(inputs.numpy(), targets.numpy(), strict=True))),
    }[kind]

    fetched_inputs, fetched_targets = fetch(dataset, INDICES)

    assert torch.equal(fetched_inputs, inputs[INDICES])
    assert torch.equal(fetched_targets, targets[INDICES])


def test_fetch_of_numbers_as_targets():
    dataset = Items([(torch.zeros(2), label) for label in (3, 1, 2)])

    _, targets = fetch(dataset, torch.tensor([2, 0]))

    assert targets.dtype == torch.int64
    assert targets.tolist() == [2, 3]


def test_fetched_cases_are_copies():
    inputs, targets = arrays()

    fetched, _ = fetch(ArrayDataset(inputs, targets), torch.tensor([0]))
    fetched.fill_(-1)

    assert inputs.min() == 0


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(3), r"pair \(input, target\), not Tensor"),
        ((torch.zeros(3),), "not tuple of length 1"),
        ({"x": 1}, "not dict"),
        ((torch.zeros(3), "seven"), "the target of a case must be .* not str"),
        ((torch.zeros(3), None), "cannot be stacked"),
    ],
)
def test_fetch_refuses_what_is_no_pair_of_tensors(item, message):
    with pytest.raises(DataError, match=message):
        fetch(Items([item, item]), torch.tensor([0, 1]))


def test_fetch_refuses_cases_of_different_shapes():
    dataset = Items([(torch.zeros(3), 0), (torch.zeros(4), 0)])

    with pytest.raises(DataError, match="cannot be stacked"):
        fetch(dataset, torch.tensor([0, 1]))


def test_array_dataset_needs_as_many_targets_as_inputs():
    with pytest.raises(DataError, match="5 inputs but 4 targets"):
        ArrayDataset(torch.zeros(5, 2), torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_are_scaled_when_fetched(dtype):
    pixels = torch.tensor([[0, 51, 255], [255, 0, 102]], dtype=torch.uint8)

    inputs, targets = fetch(ImageDataset(pixels, None, dtype), torch.tensor([1, 0]))

    expected = torch.tensor([[1, 0, 0.4], [0, 0.2, 1]], dtype=dtype)
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-7)
    assert targets is inputs
    assert pixels.dtype == torch.uint8


def test_images_with_labels():
    pixels = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8)
    dataset = ImageDataset(pixels, torch.tensor([7, 2]), torch.float64)

    assert fetch(dataset, torch.tensor([1]))[1].tolist() == [2]
    assert dataset[0][0].tolist() == [0.0, 1.0]
    assert dataset[0][1] == 7


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_check_finite_names_split_case_place_and_value(value):
    inputs, targets = arrays(5000)
    inputs[4321, 2] = value

    with pytest.raises(
        DataError, match=rf"train data, input of case 4321 at position 2 is {value}"
    ):
        check_finite(ArrayDataset(inputs, targets), "train")


def test_check_finite_of_targets_in_any_data_set():
    items = [(np.zeros((2, 2)), 0.5) for _ in range(4)]
    items[3] = (np.zeros((2, 2)), math.nan)

    with pytest.raises(DataError, match="test data, target of case 3 is nan"):
        check_finite(Items(items), "test")


def test_check_finite_names_a_position_of_many_dimensions():
    inputs = torch.zeros(2, 3, 4)
    inputs[1, 2, 0] = math.inf

    with pytest.raises(DataError, match=r"case 1 at position \(2, 0\) is inf"):
        check_finite(ArrayDataset(inputs, torch.zeros(2)), "train")


LABELS = TargetRange(lowest=0, highest=9, are_labels=True)


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_out_of_range_is_named_with_split_case_and_value(label):
    targets = torch.arange(5000) % 10
    targets[17] = -100  # left out, as torch's cross_entropy does
    targets[4321] = label

    with pytest.raises(
        DataError,
        match=rf"test data, target of case 4321 is {label}: it must be a class from 0 to 9,",
    ):
        check_finite(ArrayDataset(torch.zeros(5000, 2), targets), "test", LABELS)


def test_a_probability_out_of_range_is_found_where_the_inputs_are_the_targets():
    images = torch.rand(3, 2)
    images[2, 1] = 1.5
    allowed = TargetRange(lowest=0, highest=1, are_labels=False)

    with pytest.raises(DataError, match=r"case 2 at position 1 is 1\.5: .* between 0 and"):
        check_finite(Items([(image, image) for image in images]), "train", allowed)


def test_labels_in_range_pass():
    check_finite(ArrayDataset(torch.zeros(11, 2), torch.arange(11) % 10), "train", LABELS)
    check_finite(ArrayDataset(torch.zeros(1, 2), torch.tensor([-100])), "train", LABELS)


def test_check_finite_accepts_integers_and_good_floats():
    check_finite(ArrayDataset(torch.zeros(3, 2), torch.arange(3)), "train")
    check_finite(ImageDataset(torch.zeros(3, 2, dtype=torch.uint8), None, torch.float32), "test")


@pytest.mark.parametrize(
    "wrap", [ArrayDataset, TensorDataset, lambda *both: Items(list(zip(*both, strict=True)))]
)
def test_limit_takes_the_first_cases(wrap):
    inputs, targets = arrays()

    limited = limit_cases(wrap(inputs, targets), "train", 4, "numbers")

    assert len(limited) == 4
    assert torch.equal(fetch(limited, torch.arange(4))[0], inputs[:4])


def test_limit_is_measured_against_the_training_cases():
    dataset = ArrayDataset(*arrays())

    assert limit_cases(dataset, "test", 100, "numbers") is dataset
    with pytest.raises(InvalidSpecError, match=r"data\.limit: 7 is more than the 6 training"):
        limit_cases(dataset, "train", 7, "numbers")
    with pytest.raises(InvalidSpecError, match=r"data\.limit: 0 is below 1 \(numbers has 6"):
        limit_cases(dataset, "train", 0, "numbers")
