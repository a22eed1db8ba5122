"""Oracle 11: the quadratic model.

At the chosen (alpha, mu), `M(delta) - M(0) = grad.delta / 2`. `u^T F v` by forward mode is the
dense product. On one linear layer with squared error, the reduction ratio is 1 for every damping
if the prediction leaves out the damping.
"""

import pytest
import torch

from kfac_dist import KFAC
from tests.oracles.truth import dense
from tests.oracles.truth.cases import DISTRIBUTIONS, NONLINEAR_BATCH, Case
from tests.oracles.truth.library import computer_for

TOLERANCE = 1e-10
SHARED = tuple(
    Case(
        widths=(3, 4, 3),
        activation="sigmoid",
        distribution=distribution,
        num_cases=4,
        shared=(2, 2),
        seed=2,
    )
    for distribution in DISTRIBUTIONS
)


@pytest.mark.parametrize("case", [*NONLINEAR_BATCH, *SHARED], ids=lambda case: case.id)
def test_forward_mode_products_are_dense_products(case):
    model, (inputs, _) = case.model(), case.data()
    F = dense.fisher(case.distribution, model, inputs)
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(4, len(F), generator=generator, dtype=torch.float64)
    gram = computer_for(case.distribution, model).fisher_sums(inputs, vectors).gram / len(inputs)
    torch.testing.assert_close(gram, vectors @ F @ vectors.T, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", NONLINEAR_BATCH, ids=lambda case: case.id)
def test_predicted_change_is_half_the_slope(case):
    l2, model, (inputs, targets) = 1e-3, case.model(), case.data()
    optimizer = KFAC(
        model,
        distribution=case.distribution,
        fisher_type="exact",
        damping={"initial": 0.5, "adapt_period": 2},
        gamma={"adapt_period": 4},
        l2=l2,
        statistics_fraction=1.0,
        fisher_fraction=0.5,
    )
    for _ in range(8):
        before = dense.parameter_vector(model)
        gradient = dense.per_case_gradients(case.distribution, model, inputs, targets).mean(dim=0)
        gradient = gradient + l2 * before
        result = optimizer.step(inputs, targets)
        delta = dense.parameter_vector(model) - before
        assert result.predicted_change == pytest.approx(0.5 * (gradient @ delta).item(), rel=1e-8)
        assert result.predicted_change < 0


def linear_optimizer(model, damping, *, rho_includes_damping):
    return KFAC(
        model,
        distribution="gaussian",
        damping={
            "initial": damping,
            "adapt_period": 1,
            "rho_includes_damping": rho_includes_damping,
        },
        l2=0.02,
        statistics_fraction=0.5,
        fisher_fraction=1.0,
    )


LINEAR = Case(widths=(5, 3), activation="linear", distribution="gaussian", num_cases=12, seed=4)


@pytest.mark.parametrize("damping", [1e-3, 1.0, 50.0])
def test_ratio_of_a_quadratic_is_one_for_every_damping(damping):
    model, (inputs, targets) = LINEAR.model(), LINEAR.data()
    optimizer = linear_optimizer(model, damping, rho_includes_damping=False)
    for step in range(1, 6):
        result = optimizer.step(inputs, targets)
        assert result.reduction_ratio == pytest.approx(1.0, rel=1e-9)
        assert result.damping == pytest.approx(damping * (19 / 20) ** step)


def test_ratio_is_above_one_with_the_damping_in_the_prediction():
    model, (inputs, targets) = LINEAR.model(), LINEAR.data()
    optimizer = linear_optimizer(model, 1.0, rho_includes_damping=True)
    assert optimizer.step(inputs, targets).reduction_ratio > 1.05
