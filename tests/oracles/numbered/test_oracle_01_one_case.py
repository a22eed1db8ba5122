"""Oracle 1: one case, or N copies of it, with any MLP and any loss.

The exact-type K-FAC block is the block of the generalised Gauss-Newton matrix, and the empirical
K-FAC block is the block of the empirical Fisher, in both vec orders.
"""

import pytest
import torch

from tests.oracles.truth import dense
from tests.oracles.truth.cases import ONE_CASE, layer_names
from tests.oracles.truth.library import mean_factors

TOLERANCE = 1e-12


def assert_blocks_equal(truth, model, factors):
    assert list(factors) == layer_names(model)
    for name, (A, G) in factors.items():
        for order in ("rows", "columns"):
            expected = dense.layer_block(truth, model, name, order)
            actual = dense.kronecker_block(A, G, order)
            torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def copied(tensor, copies):
    return torch.cat([tensor] * copies)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("case", ONE_CASE, ids=lambda case: case.id)
def test_exact_block_is_the_gauss_newton_block(case, copies):
    model, (inputs, targets) = case.model(), case.data()
    truth = dense.fisher(case.distribution, model, inputs)
    factors = mean_factors(
        case.distribution, model, copied(inputs, copies), copied(targets, copies), "exact"
    )
    assert_blocks_equal(truth, model, factors)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("case", ONE_CASE, ids=lambda case: case.id)
def test_empirical_block_is_the_empirical_fisher_block(case, copies):
    model, (inputs, targets) = case.model(), case.data()
    truth = dense.empirical_fisher(case.distribution, model, inputs, targets)
    factors = mean_factors(
        case.distribution, model, copied(inputs, copies), copied(targets, copies), "empirical"
    )
    assert_blocks_equal(truth, model, factors)


@pytest.mark.parametrize("case", ONE_CASE, ids=lambda case: case.id)
def test_output_fisher_of_the_truth_is_the_hessian_of_torchs_loss(case):
    model, (inputs, targets) = case.model(), case.data()
    outputs = model(inputs)[0].detach()
    torch.testing.assert_close(
        dense.output_fisher(case.distribution, outputs),
        dense.output_hessian(case.distribution, outputs, targets[0]),
        rtol=TOLERANCE,
        atol=TOLERANCE,
    )
