import math

import pytest
import torch

from kfac_dist.core.vector import all_finite, is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]])
def test_a_single_element_that_is_not_finite_is_found(bad, dtype):
    values = torch.ones(3, 100, dtype=dtype)
    assert is_finite(values)
    values[1, 7 : 7 + len(bad)] = torch.tensor(bad, dtype=dtype)
    assert not is_finite(values)


def test_finite_numbers_whose_sum_overflows_are_finite():
    assert is_finite(torch.full((100,), torch.finfo(torch.float32).max))


def test_an_empty_tensor_is_finite():
    assert is_finite(torch.ones(0))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_tensor_among_several_of_any_type_is_found(place):
    largest = torch.finfo(torch.float32).max
    tensors = [torch.ones(3), torch.ones(2, 2, dtype=torch.float64), torch.full((9,), largest)]
    assert all_finite(tensors)
    assert all_finite(iter(tensors))
    tensors[place].view(-1)[1] = math.nan
    assert not all_finite(tensors)


def test_no_tensors_are_finite():
    assert all_finite([])
