"""Inner products formed block by block: equal to those of whole vectors, added in one order."""

import pytest
import torch

from kfac_dist.core.step.block_numbers import (
    add_up,
    block_numbers,
    block_squares,
    direction_numbers,
    total_square,
)

SIZES = {"a": 6, "b": 4, "c": 9}


def vectors(count: int, dtype: torch.dtype = torch.float64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {name: torch.randn(size, dtype=dtype, generator=generator) for name, size in SIZES.items()}
        for _ in range(count)
    ]


def flat(regions: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(regions.values()))


@pytest.mark.parametrize("num_directions", [1, 3])
def test_the_numbers_are_inner_products_of_the_whole_vectors(num_directions):
    gradient, previous, *directions = vectors(2 + num_directions)
    rows = block_numbers(gradient, directions, previous)
    assert rows.shape == (len(SIZES), 2 + 3 * num_directions)
    numbers = direction_numbers(rows)
    whole = flat(gradient), flat(previous)
    assert numbers.gradient_previous == pytest.approx((whole[0] @ whole[1]).item(), rel=1e-12)
    assert numbers.previous_previous == pytest.approx((whole[1] @ whole[1]).item(), rel=1e-12)
    assert len(numbers.directions) == num_directions
    for triple, direction in zip(numbers.directions, map(flat, directions), strict=True):
        expected = [(direction @ v).item() for v in (whole[0], direction, whole[1])]
        assert list(triple) == pytest.approx(expected, rel=1e-12)


def test_numbers_of_float32_are_added_in_float64():
    gradient, previous, direction = vectors(3, torch.float32)
    rows = block_numbers(gradient, [direction], previous)
    assert rows.dtype == torch.float64
    assert torch.equal(rows, rows.float().double()), "each product is rounded as in its block"
    sums = torch.tensor(add_up(rows), dtype=torch.float64)
    assert not torch.equal(sums, sums.float().double()), "their sum is not"


def test_rows_are_added_one_after_the_other():
    rows = torch.tensor([[1e16, 1.0], [1.0, 2.0], [-1e16, 3.0], [1.0, 4.0]], dtype=torch.float64)
    assert add_up(rows) == [1.0, 10.0]
    assert add_up(rows.flip(0)) == [0.0, 10.0]


def test_blocks_of_several_processes_give_the_bits_of_one():
    gradient, previous, *directions = vectors(5)
    whole = block_numbers(gradient, directions, previous)
    pieces = []
    for name in SIZES:
        own = [{name: regions[name]} for regions in (gradient, previous, *directions)]
        pieces.append(block_numbers(own[0], own[2:], own[1]))
    assert direction_numbers(torch.cat(pieces)) == direction_numbers(whole)


def test_squares_by_block():
    (values,) = vectors(1)
    squares = block_squares(values.values())
    expected = [region.square().sum().item() for region in values.values()]
    assert squares.tolist() == pytest.approx(expected, rel=1e-14)
    a, b, c = squares.tolist()
    assert total_square(squares) == a + b + c
