import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.core.packing import mirror_lower, pack, packed_size, unpack


@given(order=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_round_trip_is_exact(order, seed):
    values = torch.randn(order, order, generator=torch.Generator().manual_seed(seed))
    symmetric = values + values.T
    triangle = pack(symmetric)
    assert triangle.shape == (packed_size(order),) == (order * (order + 1) // 2,)
    assert torch.equal(unpack(triangle), symmetric)
    assert torch.equal(pack(unpack(triangle)), triangle)


def test_triangle_runs_by_rows():
    matrix = torch.tensor([[1.0, 2.0, 4.0], [2.0, 3.0, 5.0], [4.0, 5.0, 6.0]])
    assert pack(matrix).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lower_triangle_is_the_truth(dtype):
    matrix = torch.arange(9, dtype=dtype).reshape(3, 3)
    mirrored = mirror_lower(matrix)
    assert torch.equal(mirrored, mirrored.T)
    assert torch.equal(mirrored.tril(), matrix.tril())
    assert torch.equal(unpack(pack(matrix)), mirrored)


@pytest.mark.parametrize("size", [2, 4, 7])
def test_sizes_that_are_not_triangles_are_refused(size):
    with pytest.raises(ValueError, match=f"{size} elements are not a packed triangle"):
        unpack(torch.ones(size))


def test_packing_makes_a_copy():
    matrix = torch.eye(3)
    pack(matrix).zero_()
    assert torch.equal(matrix, torch.eye(3))
