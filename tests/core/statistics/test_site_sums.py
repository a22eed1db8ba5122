import pytest
import torch

from kfac_dist.core.statistics.site_sums import add_second_moment


@pytest.mark.parametrize("order", [1, 30, 256, 257, 600])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_panels_are_the_whole_product(order, weight):
    generator = torch.Generator().manual_seed(order)
    first, second = (torch.randn(9, order, generator=generator).double() for _ in range(2))
    total = torch.zeros(order, order, dtype=torch.float64)
    add_second_moment(total, first)
    add_second_moment(total, second, weight)
    expected = first.T @ first + weight * second.T @ second
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_rows_may_be_a_view_of_some_columns():
    wide = torch.arange(24.0).reshape(4, 6)
    total = torch.zeros(3, 3)
    add_second_moment(total, wide[:, 1:4])
    assert torch.equal(total, wide[:, 1:4].T @ wide[:, 1:4])


def test_no_rows_add_nothing():
    total = torch.ones(3, 3)
    add_second_moment(total, torch.ones(0, 3))
    assert torch.equal(total, torch.ones(3, 3))
