import math

import pytest
import torch

from kfac_dist.core.passes.fisher import FisherSums, fisher_fraction


def roots(num_vectors=3, num_cases=40):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_vectors, num_cases, 2, 5, dtype=torch.float64, generator=generator)


def test_sums_are_those_of_the_products_of_cases():
    u = roots().flatten(2)
    products = torch.einsum("ink,jnk->nij", u, u)
    sums = FisherSums.from_roots(roots())
    torch.testing.assert_close(sums.gram, products.sum(dim=0))
    diagonals = products.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(sums.squares, diagonals.square().sum(dim=0))
    noise = diagonals[:, 1].var(correction=0) / diagonals[:, 1].mean() ** 2
    assert sums.mean(40).noise(1) == pytest.approx(float(noise))


def test_sums_of_parts_add_up_when_packed():
    parts = [FisherSums.from_roots(roots()[:, :13]), FisherSums.from_roots(roots()[:, 13:])]
    parts.append(FisherSums.zero(3, torch.zeros(1)))
    total = FisherSums.unpacked(torch.stack([part.packed() for part in parts]).sum(dim=0))
    torch.testing.assert_close(total.packed(), FisherSums.from_roots(roots()).packed())


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_products_without_information_have_infinite_noise(value):
    sums = FisherSums.unpacked(torch.full((2, 1), value, dtype=torch.float64))
    assert sums.mean(5).noise(0) == math.inf


@pytest.mark.parametrize(
    ("noise", "num_cases", "expected"),
    [
        (math.inf, 1000, 1.0),  # before the first products
        (0.0, 1000, 0.125),
        (2.8, 1000, 0.125),
        (2.9, 1000, 0.25),
        (11.0, 1000, 0.5),
        (12.0, 1000, 1.0),
        (2.9, 4000, 0.0625),  # a smaller part of a larger batch
        (0.0, 4000, 0.03125),
        (0.0, 60_000, 0.03125),
        (0.0, 400, 0.25),  # at least a hundred cases
        (0.0, 64, 1.0),
    ],
)
def test_auto_takes_the_fewest_cases_that_are_enough(noise, num_cases, expected):
    assert fisher_fraction("auto", noise, num_cases) == expected


def test_a_fraction_that_is_set_stays():
    assert fisher_fraction(0.3, math.inf, 1000) == 0.3
