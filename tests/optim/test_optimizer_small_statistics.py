"""Few cases for the statistics: batch normalisation, and statistics that are refused."""

import logging

import pytest
import torch
from torch import nn

from kfac_dist import KFAC, KFACPreconditioner


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("options", [{}, {"fisher_fraction": 0.01}], ids=str)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_two_cases_are_taken_for_a_batch_norm(size, options):
    model = normalised()
    optimizer = KFAC(model, distribution="categorical", **options)
    for _ in range(3):
        assert optimizer.step(torch.randn(size, 6), torch.randint(3, (size,))).applied
    assert not optimizer.numeric_events["refused_statistics"]


def test_in_a_loop_of_ones_own_too():
    model = normalised()
    preconditioner = KFACPreconditioner(model, distribution="categorical")
    for _ in range(3):
        model(torch.randn(8, 6)).square().mean().backward()
        preconditioner.step()
    assert not preconditioner.numeric_events["refused_statistics"]
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


class Overflowing(nn.Module):
    """Its derivatives overflow in the backward pass of the statistics alone."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(6, 5), nn.Linear(5, 3)
        self.factor = 1.0

    def forward(self, x):
        h = self.first(x)
        h.register_hook(lambda gradient: gradient * self.factor)
        return self.out(torch.tanh(h))


def test_several_refusals_in_a_row_give_one_warning_that_names_the_layers(caplog):
    model = Overflowing()
    preconditioner = KFACPreconditioner(model, distribution="categorical")

    def step(factor):
        model.zero_grad()
        model.factor = 1.0
        model(torch.randn(16, 6)).square().mean().backward()
        model.factor = factor
        preconditioner.step()

    for factor in (1.0, float("inf"), float("inf"), 1.0, float("inf"), float("inf")):
        step(factor)
    assert not caplog.records  # never three in a row
    for _ in range(7):
        step(float("inf"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "3 updates in a row were refused" in record.message
    assert "(layers first)" in record.message
    assert preconditioner.numeric_events["refused_statistics"] == 11


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ([8], {}, 8),
        ([64], {}, 32),
        ([512], {}, 64),
        ([16, 16, 16, 16], {}, 64),
        ([64], {"statistics_fraction": 0.125}, 8),
    ],
)
def test_the_preconditioner_has_32_cases_unless_a_fraction_is_given(sizes, options, expected):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    preconditioner = KFACPreconditioner(model, distribution="categorical", **options)
    found = []
    alone = preconditioner._curvature.update
    preconditioner._curvature.update = lambda step, sums, n: (found.append(n), alone(step, sums, n))
    for size in sizes:
        model(torch.randn(size, 6)).square().mean().backward()
    preconditioner.step()
    assert found == [expected]
