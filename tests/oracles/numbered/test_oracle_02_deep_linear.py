"""Oracle 2: a deep linear net with squared error, any number of cases.

The exact-type K-FAC block is the Gauss-Newton block of every layer. With sampled targets, K-FAC
tends to it; the empirical block differs. For nets with nonlinearities, the tests show the same for
the factors.
"""

import pytest
import torch

from tests.oracles.truth import dense
from tests.oracles.truth.cases import DEEP_LINEAR, NONLINEAR_BATCH, layer_names
from tests.oracles.truth.library import mean_factors

TOLERANCE = 1e-12
# Relative Frobenius error of G from K sampled targets is about dim_G / sqrt(K).
MC_DRAWS = 40_000
MC_TOLERANCE = 0.03


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", DEEP_LINEAR, ids=lambda case: case.id)
def test_exact_block_is_the_gauss_newton_block(case):
    model, (inputs, targets) = case.model(), case.data()
    truth = dense.fisher("gaussian", model, inputs)
    for name, (A, G) in mean_factors("gaussian", model, inputs, targets, "exact").items():
        for order in ("rows", "columns"):
            expected = dense.layer_block(truth, model, name, order)
            actual = dense.kronecker_block(A, G, order)
            torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", DEEP_LINEAR, ids=lambda case: case.id)
def test_empirical_block_differs(case):
    model, (inputs, targets) = case.model(), case.data()
    truth = dense.fisher("gaussian", model, inputs)
    for name, (A, G) in mean_factors("gaussian", model, inputs, targets, "empirical").items():
        block = dense.layer_block(truth, model, name, "rows")
        assert relative_error(dense.kronecker_block(A, G, "rows"), block) > 0.1


@pytest.mark.parametrize("case", [*DEEP_LINEAR[:3], *NONLINEAR_BATCH], ids=lambda case: case.id)
def test_sampled_factors_tend_to_the_exact_ones(case):
    model, (inputs, targets) = case.model(), case.data()
    errors = {}
    for draws in (MC_DRAWS // 100, MC_DRAWS):
        copies = draws // case.num_cases
        many_inputs = torch.cat([inputs] * copies)
        many_targets = torch.cat([targets] * copies)
        sampled = mean_factors(case.distribution, model, many_inputs, many_targets, "mc", seed=3)
        errors[draws] = []
        for name in layer_names(model):
            A, G = sampled[name]
            exact = dense.exact_output_factor(case.distribution, model, name, inputs)
            torch.testing.assert_close(
                A, dense.input_factor(model, name, inputs), rtol=TOLERANCE, atol=TOLERANCE
            )
            errors[draws].append(relative_error(G, exact))
    assert max(errors[MC_DRAWS]) < MC_TOLERANCE
    assert max(errors[MC_DRAWS]) < 0.5 * max(errors[MC_DRAWS // 100])


@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
@pytest.mark.parametrize("case", NONLINEAR_BATCH, ids=lambda case: case.id)
def test_factors_of_a_batch(case, fisher_type):
    model, (inputs, targets) = case.model(), case.data()
    factors = mean_factors(case.distribution, model, inputs, targets, fisher_type)
    for name, (A, G) in factors.items():
        if fisher_type == "exact":
            expected = dense.exact_output_factor(case.distribution, model, name, inputs)
        else:
            expected = dense.empirical_output_factor(
                case.distribution, model, name, inputs, targets
            )
        torch.testing.assert_close(
            A, dense.input_factor(model, name, inputs), rtol=TOLERANCE, atol=TOLERANCE
        )
        torch.testing.assert_close(G, expected, rtol=TOLERANCE, atol=TOLERANCE)
